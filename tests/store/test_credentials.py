"""Credentials that change while a run goes on: what an agent gives to a pod (EKS Pod Identity, ECS, the workload
identities of Google and Azure) is fetched again before it expires, for objects and for the catalogue.

The agent of S3 here is a folder over HTTP with a file of such an agent's answer. Keys in environment variables cannot
change in a running process: a pod that has those is restarted.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from allele.store import Fact, Objects, PopulationRecord, PopulationStore, StoreRefused
from allele.store.capability import probe
from tests.store.conftest import enter
from tests.store.identity import Certificate, answering, storage_token
from tests.store.servers import (
    ACCOUNT,
    BUCKET,
    AzureServer,
    GoogleServer,
    S3Server,
    azure,
    serve,
    signature,
    versitygw,
    wait_for,
)

LIFETIME = 2.0
"""Seconds that the first credentials are valid; what the answer says has whole seconds."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    for folder in ("s3", "iam"):
        (tmp_path / folder).mkdir()
    with serve(tmp_path / "s3", "--iam-dir", str(tmp_path / "iam")) as started:
        for user in ("old", "new"):
            administer(started, "create-user", "--access", user, "--secret", f"secret of {user}", "--role", "admin")
        yield started


def administer(server: S3Server, *command: str) -> None:
    key, secret = server.environ["AWS_ACCESS_KEY_ID"], server.environ["AWS_SECRET_ACCESS_KEY"]
    options = ["--access", key, "--secret", secret, "--endpoint-url", server.environ["AWS_ENDPOINT_URL"]]
    subprocess.run([versitygw(), "admin", *options, *command], check=True, capture_output=True)


@pytest.fixture
def agent(tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder that the agent serves; this process's environment names the agent and has no keys."""
    folder = tmp_path / "agent"
    folder.mkdir()
    (tmp_path / "token").write_text("pod")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "agent.log").open("wb")
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", folder, str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{port}/credentials.json")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
    try:
        wait_for(port, process, tmp_path / "agent.log")
        yield folder
    finally:
        process.kill()
        process.wait()
        log.close()


def give(agent: Path, user: str, expires: datetime) -> None:
    answer = {"AccessKeyId": user, "SecretAccessKey": f"secret of {user}", "Token": ""}
    (agent / "next").write_text(json.dumps({**answer, "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ")}))
    (agent / "next").replace(agent / "credentials.json")


def wait_until(time_: datetime) -> None:
    time.sleep(max(0.0, (time_ - datetime.now(UTC)).total_seconds()))


def rotate_in_the_middle_of_a_run(url: str, rotate: Callable[[], None]) -> None:
    store = PopulationStore.open(url, namespace="team", population="users")
    writer = store.catalogue.start("run")
    writer.commit(1, [Fact(kind="Exposed", member="m", revision=1)])
    rotate()
    ranges = store.write_segments({"m": b"bytes"})
    writer.commit(2, [Fact.committed(member="m", revision=1, weights=ranges["m"], shape="s")])
    assert store.read(ranges["m"]) == b"bytes"
    assert [f.kind for f in store.catalogue.facts()] == ["Exposed", "Committed"]


def test_credentials_rotate_in_the_middle_of_a_run(server: S3Server, agent: Path) -> None:
    expires = datetime.now(UTC) + timedelta(seconds=LIFETIME)
    give(agent, "old", expires)

    def rotate() -> None:
        give(agent, "new", datetime.now(UTC) + timedelta(hours=1))
        wait_until(expires)
        administer(server, "delete-user", "--access", "old")

    rotate_in_the_middle_of_a_run(f"s3://{BUCKET}/rotation", rotate)
    keys = {**os.environ, "AWS_ACCESS_KEY_ID": "old", "AWS_SECRET_ACCESS_KEY": "secret of old"}
    with pytest.raises(StoreRefused):
        Objects.open(f"s3://{BUCKET}/rotation", keys).get("m")


def test_credentials_of_a_web_identity_rotate(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an AWS role for a service account: the pod's token is changed for keys that expire."""
    expires = datetime.now(UTC) + timedelta(seconds=LIFETIME)
    roles = [("old", expires)]
    (tmp_path / "token").write_text("of the service account")

    def sts(path: str, form: dict[str, str]) -> str | None:
        if (form["Action"], form["WebIdentityToken"], form["RoleArn"]) != (
            "AssumeRoleWithWebIdentity", "of the service account", "arn:aws:iam::123456789012:role/alleles",
        ):  # fmt: skip
            return None
        user, until = roles[-1]
        found = {
            "AccessKeyId": user,
            "SecretAccessKey": f"secret of {user}",
            "SessionToken": "",
            "Expiration": until.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        fields = "".join(f"<{name}>{value}</{name}>" for name, value in found.items())
        answer = "AssumeRoleWithWebIdentity"
        return (
            f"<{answer}Response><{answer}Result><Credentials>{fields}</Credentials></{answer}Result></{answer}Response>"
        )

    def rotate() -> None:
        roles.append(("new", datetime.now(UTC) + timedelta(hours=1)))
        wait_until(expires)
        administer(server, "delete-user", "--access", "old")

    certificate = Certificate.make(tmp_path)
    with answering(sts, certificate) as address:
        environ = {
            "AWS_ENDPOINT_URL": server.environ["AWS_ENDPOINT_URL"],
            "AWS_ENDPOINT_URL_STS": f"https://{address}",
            "AWS_REGION": "us-east-1",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/alleles",
            "AWS_ROLE_SESSION_NAME": "pod",
        }
        enter(environ, monkeypatch)
        for name in ("SSL_CERT_FILE", "AWS_CA_BUNDLE"):  # the second is boto3's
            monkeypatch.setenv(name, str(certificate.cert))
        rotate_in_the_middle_of_a_run(f"s3://{BUCKET}/rotation", rotate)
        assert probe(f"s3://{BUCKET}/rotation").reachable


def test_tokens_of_a_google_workload_identity_rotate(gs_server: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata server's; the store takes the old one no more."""
    first = datetime.now(UTC) + timedelta(seconds=LIFETIME)
    admitted = gs_server.gatekeeper.tokens
    admitted.add("old")

    def token(path: str, form: dict[str, str]) -> dict[str, object]:
        assert path.startswith("/computeMetadata/v1/instance/service-accounts/default/token")
        (now,) = admitted
        left = (first - datetime.now(UTC)).total_seconds() if now == "old" else 3600
        return {"access_token": now, "expires_in": max(1, round(left)), "token_type": "Bearer"}

    def rotate() -> None:
        admitted.add("new")
        admitted.remove("old")
        wait_until(first)

    with answering(token) as host:
        environ = {"GOOGLE_BASE_URL": gs_server.environ["GOOGLE_BASE_URL"]}
        enter(environ | {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host}, monkeypatch)
        rotate_in_the_middle_of_a_run(f"gs://{BUCKET}/rotation", rotate)
        assert probe(f"gs://{BUCKET}/rotation").checksums
    admitted.clear()


def test_tokens_of_an_azure_workload_identity_rotate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes writes a new token into the file, which Microsoft's login changes for one of the storage."""
    file, given, lives = tmp_path / "token", list[str](), list[datetime]()
    file.write_text("old")

    def login(path: str, form: dict[str, str]) -> dict[str, object] | None:
        assert path == "/tenant/oauth2/v2.0/token"
        if form["client_assertion"] != file.read_text():
            return None
        lives.append(datetime.now(UTC) + timedelta(seconds=LIFETIME * 3))
        expires = lives[0] if file.read_text() == "old" else datetime.now(UTC) + timedelta(hours=1)
        given.append(storage_token(expires))
        left = (expires - datetime.now(UTC)).total_seconds()
        return {"access_token": given[-1], "expires_in": max(1, round(left)), "token_type": "Bearer"}

    def rotate() -> None:
        file.write_text("new")
        wait_until(lives[0] + timedelta(seconds=1))

    certificate = Certificate.make(tmp_path)
    with azure(tmp_path, certificate) as server, answering(login, certificate) as host:
        enter(server.environ, monkeypatch)
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
        monkeypatch.setenv("AZURE_CLIENT_ID", "client")
        monkeypatch.setenv("AZURE_TENANT_ID", "tenant")
        monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(file))
        monkeypatch.setenv("AZURE_AUTHORITY_HOST", f"https://{host}/")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.cert))
        rotate_in_the_middle_of_a_run(f"az://{BUCKET}/rotation", rotate)
        assert probe(f"az://{BUCKET}/rotation").checksums
        with pytest.raises(HTTPError, match=r"40[13]"):
            listed(server.environ["AZURE_STORAGE_ENDPOINT"], given[0], certificate)
        listed(server.environ["AZURE_STORAGE_ENDPOINT"], given[-1], certificate)


def listed(endpoint: str, token: str, certificate: Certificate) -> None:
    """Raises HTTPError where the token is not let in."""
    headers = {"Authorization": f"Bearer {token}", "x-ms-version": "2021-08-06"}
    request = Request(f"{endpoint}/{BUCKET}?restype=container&comp=list", headers=headers)
    urlopen(request, context=ssl.create_default_context(cafile=certificate.cert)).close()


def opens(url: str) -> None:
    """Objects and the catalogue, with what is in this process's environment."""
    store = PopulationStore.open(url, namespace="team", population="users")
    store.claim(PopulationRecord(uid="uid", base_digest="b", shapes={}))
    store.catalogue.start("run").commit(1, [Fact(kind="Exposed", member="m", revision=1)])
    assert len(store.catalogue.facts()) == 1


def test_the_file_of_a_google_service_account(
    gs_server: GoogleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key.json").write_text(gs_server.environ["GOOGLE_SERVICE_ACCOUNT_KEY"])
    environ = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json")}
    enter(environ | {"GOOGLE_BASE_URL": gs_server.environ["GOOGLE_BASE_URL"]}, monkeypatch)
    opens(f"gs://{BUCKET}/file")


def test_an_emulator_of_google_is_not_told_who_asks(gs_server: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    enter({"STORAGE_EMULATOR_HOST": gs_server.environ["GOOGLE_BASE_URL"].removeprefix("http://")}, monkeypatch)
    with pytest.raises(StoreRefused):
        opens(f"gs://{BUCKET}/emulator")
    monkeypatch.setattr(gs_server.gatekeeper, "tokens", {""})
    opens(f"gs://{BUCKET}/emulator")


def test_a_shared_access_signature_of_azure(az_server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    end = f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    said = {"sp": "rwdlac", "ss": "b", "srt": "sco", "st": "", "se": end, "sip": "", "spr": "", "sv": "2021-08-06"}
    sign = signature("\n".join([ACCOUNT, *said.values(), "", ""]))
    enter(az_server.environ, monkeypatch)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", urlencode({k: v for k, v in said.items() if v} | {"sig": sign}))
    opens(f"az://{BUCKET}/signature")
    found = probe(f"az://{BUCKET}/signature")
    assert (found.reachable, found.checksums) == (True, True), found.message
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", urlencode(said | {"sig": "d3Jvbmc="}))
    assert probe(f"az://{BUCKET}/signature").reason == "CredentialsRefused"
