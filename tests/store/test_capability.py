"""The probe says in one word what is wrong with a store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from allele.protocol.errors import InvalidRequest
from allele.store import Objects, PopulationRecord, PopulationStore, StoreRefused
from allele.store.capability import main, probe
from allele_cli.main import app
from tests.store import flawed, gcs
from tests.store.conftest import enter

pytestmark = pytest.mark.everywhere


def test_a_good_store_has_everything_and_nothing_is_left_behind(store_url: str) -> None:
    found = probe(store_url)
    assert found.reachable, found.message
    assert (found.create_only, found.if_match, found.ranged_read, found.list) == (True,) * 4
    assert found.checksums == (not store_url.startswith("file:"))
    assert list(Objects.open(store_url).list()) == []


def test_it_says_how_long_requests_take(store_url: str) -> None:
    found = probe(store_url)
    assert found.latency is not None
    assert min(found.latency.put, found.latency.get, found.latency.conditional_put) > 0
    assert str(found.latency).startswith(f"{found.latency.put:.3g}/")


def test_a_whole_bucket_is_a_store(bucket_url: str) -> None:
    found = probe(bucket_url.rpartition("/")[0])
    assert found.reachable, found.message


def test_a_missing_bucket(bucket_url: str) -> None:
    found = probe(f"{bucket_url[:2]}://no-such-bucket/prefix")
    assert (found.reachable, found.reason, found.latency) == (False, "BucketMissing", None)
    assert "such" in found.message


@pytest.mark.parametrize(
    ("scheme", "name", "value"),
    [
        ("s3", "AWS_SECRET_ACCESS_KEY", "wrong"),
        ("s3", "AWS_ACCESS_KEY_ID", "nobody"),
        ("s3", "AWS_ACCESS_KEY_ID", ""),
        ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", gcs.account_key(gcs.new_key())),
        ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", "not JSON"),
        ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", ""),
        ("az", "AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc="),
        ("az", "AZURE_STORAGE_ACCOUNT_KEY", "not base64"),
        ("az", "AZURE_STORAGE_ACCOUNT_NAME", "nobody"),
        ("az", "AZURE_STORAGE_ACCOUNT_NAME", ""),
    ],
)
def test_wrong_credentials(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, scheme: str, name: str, value: str
) -> None:
    enter(request.getfixturevalue(f"{scheme}_server").environ, monkeypatch)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    for where in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
        monkeypatch.setenv(where, "127.0.0.1:9")
    found = probe(f"{scheme}://alleles/prefix")
    assert (found.reachable, found.reason) == (False, "CredentialsRefused"), found.message


@pytest.mark.parametrize(
    ("scheme", "name", "value"),
    [
        ("s3", "AWS_SECRET_ACCESS_KEY", "wrong"),
        ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", gcs.account_key(gcs.new_key())),
        ("az", "AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc="),
        ("az", "AZURE_STORAGE_ACCOUNT_KEY", "not base64"),
    ],
)
def test_every_request_with_wrong_credentials_is_refused(
    request: pytest.FixtureRequest, scheme: str, name: str, value: str
) -> None:
    environ = {**request.getfixturevalue(f"{scheme}_server").environ, name: value}
    attempts: list[Callable[[Objects], object]] = [
        lambda objects: list(objects.list()),
        lambda objects: objects.folders(),
        lambda objects: objects.get("x"),
        lambda objects: objects.create("x", b""),
    ]
    for attempt in attempts:
        with pytest.raises(StoreRefused, match="credentials refused"):
            attempt(Objects.open(f"{scheme}://alleles/prefix", environ))


def test_nobody_there(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flawed.ENDPOINTS[bucket_url[:2]], "http://127.0.0.1:9")
    found = probe(bucket_url)
    assert (found.reachable, found.reason) == (False, "Unreachable")
    assert probe(bucket_url).message == found.message, "the same is said the same way"


@pytest.mark.parametrize(
    ("flaw", "reason", "words"),
    [
        ("conditions", "NoConditionalWrites", "overwrite each other's commits"),
        ("ranges", "NoRangedReads", ""),
        ("after", "NoListing", "new commits would not be found"),
    ],
)
def test_a_server_that_ignores_something_is_not_good_enough(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch, flaw: str, reason: str, words: str
) -> None:
    with flawed.serve(bucket_url[:2], flaw) as url:
        monkeypatch.setenv(flawed.ENDPOINTS[bucket_url[:2]], url)
        found = probe(bucket_url)
    assert (found.reachable, found.reason) == (False, reason), found.message
    assert words in found.message


def test_checksums_that_nobody_looks_at_are_told_and_not_needed(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flawed.serve(bucket_url[:2], "") as url:
        monkeypatch.setenv(flawed.ENDPOINTS[bucket_url[:2]], url)
        found = probe(bucket_url)
    assert found.reachable, found.message
    assert not found.checksums


def test_the_command_prints_and_leaves_a_termination_message(s3_environ: Any, tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    command = [
        sys.executable,
        "-m",
        "allele.store.capability",
        "--store",
        "s3://no-such-bucket",
        "--termination-log",
        log,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout) == json.loads(log.read_text())
    assert json.loads(log.read_text())["reason"] == "BucketMissing"
    assert len(log.read_text()) <= 1400


def test_a_probe_of_s3_needs_none_of_the_libraries_that_move_bytes(s3_environ: Any) -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('obstore', 'deltalake', 'pyarrow', 'numpy')))"
    command = f"{blocked}; from allele.store.capability import main; sys.exit(main(['--store', 's3://alleles/alone']))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_succeeds_on_a_good_store(store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--store", store_url]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "Reachable"


def test_a_url_that_names_no_store_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected s3://"):
        probe("http://bucket")


def test_the_cli_looks_at_stores_of_every_provider(bucket_url: str) -> None:
    store = PopulationStore.open(bucket_url, namespace="team", population="users")
    store.claim(PopulationRecord(uid="uid", base_digest="b", shapes={}))
    runner = CliRunner(env={"COLUMNS": "250"})
    (found,) = json.loads(runner.invoke(app, ["stores", "--store", bucket_url, "-o", "json"]).stdout)
    assert (found["reachable"], found["capabilities"]) == ("True", "CreateOnly IfMatch RangedRead List Checksums")
    listed = runner.invoke(app, ["populations", "--store", bucket_url, "--namespace", "team", "-o", "json"])
    assert [p["population"] for p in json.loads(listed.stdout)] == ["users"]
