"""Credentials that change while a run goes on: what an agent gives to a pod (EKS Pod Identity, ECS) is fetched again
before it expires, for objects and for the catalogue.

The agent here is a folder over HTTP with a file of such an agent's answer. Keys in environment variables cannot change
in a running process: a pod that has those is restarted.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from allele.store import Fact, Objects, PopulationStore, StoreRefused
from tests.store.servers import BUCKET, S3Server, serve, versitygw, wait_for

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


def test_credentials_rotate_in_the_middle_of_a_run(server: S3Server, agent: Path) -> None:
    expires = datetime.now(UTC) + timedelta(seconds=LIFETIME)
    give(agent, "old", expires)
    store = PopulationStore.open(f"s3://{BUCKET}/rotation", namespace="team", population="users")
    writer = store.catalogue.start("run")
    writer.commit(1, [Fact(kind="Exposed", member="m", revision=1)])
    give(agent, "new", datetime.now(UTC) + timedelta(hours=1))
    time.sleep(max(0.0, (expires - datetime.now(UTC)).total_seconds()))
    administer(server, "delete-user", "--access", "old")
    ranges = store.write_segment({"m": b"bytes"})
    writer.commit(2, [Fact.committed(member="m", revision=1, weights=ranges["m"], shape="s")])
    assert store.read(ranges["m"]) == b"bytes"
    assert [f.kind for f in store.catalogue.facts()] == ["Exposed", "Committed"]
    keys = {**os.environ, "AWS_ACCESS_KEY_ID": "old", "AWS_SECRET_ACCESS_KEY": "secret of old"}
    with pytest.raises(StoreRefused):
        Objects.open(f"s3://{BUCKET}/rotation", keys).get("m")
