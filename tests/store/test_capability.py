"""The probe says in one word what is wrong with a store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from allele.protocol.errors import InvalidRequest
from allele.store.capability import main, probe


def test_a_good_store_has_everything_and_nothing_is_left_behind(store_url: str) -> None:
    from allele.store import Objects

    found = probe(store_url)
    assert found.reachable, found.message
    assert (found.create_only, found.if_match, found.ranged_read, found.list) == (True,) * 4
    assert list(Objects.open(store_url).list()) == []


def test_a_missing_bucket(s3_environ: Any) -> None:
    found = probe("s3://no-such-bucket/prefix")
    assert (found.reachable, found.reason) == (False, "BucketMissing")
    assert "no-such-bucket" in found.message


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_ACCESS_KEY_ID", "")]
)
def test_wrong_credentials(s3_environ: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    assert probe("s3://alleles/prefix").reason == "CredentialsRefused"


def test_nobody_there(s3_environ: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    found = probe("s3://alleles/prefix")
    assert (found.reachable, found.reason) == (False, "Unreachable")


class Careless(BaseHTTPRequestHandler):
    """An S3 server that answers every PUT, whatever its conditions."""

    def _answer(self, status: int, body: bytes) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self._answer(200, b"")

    def do_DELETE(self) -> None:
        self._answer(204, b"")

    def do_GET(self) -> None:
        listing = b'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"></ListBucketResult>'
        self._answer(*((206, b"234") if self.headers.get("Range") else (200, listing)))

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_that_ignores_conditions_is_not_good_enough(s3_environ: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Careless) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        found = probe("s3://alleles/prefix")
        server.shutdown()
        thread.join()
    assert (found.reachable, found.reason) == (False, "NoConditionalWrites")
    assert not found.create_only


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


def test_the_command_succeeds_on_a_good_store(store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--store", store_url]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "Reachable"


def test_a_url_that_names_no_store_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected s3://"):
        probe("gs://bucket")
