"""Where a benchmark keeps its objects: a folder, or a real S3 server of its own on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import Any

import boto3
from botocore.config import Config

from allele.store import Objects

REPOSITORY = pathlib.Path(__file__).parents[2]
BUCKET = "bench"


@dataclasses.dataclass(frozen=True)
class Place:
    name: str
    url: str
    environ: dict[str, str]

    def store(self) -> Objects:
        """An empty prefix."""
        return Objects.open(f"{self.url}/{uuid.uuid4().hex}", self.environ)

    def boto3(self) -> Any:
        """A client as its documentation makes it."""
        return boto3.client(
            "s3",
            endpoint_url=self.environ["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environ["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environ["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environ["AWS_REGION"],
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=64),
        )


@contextlib.contextmanager
def files() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder:
        yield Place("files", f"file://{folder}", {})


@contextlib.contextmanager
def s3() -> Iterator[Place]:
    """versitygw: durable files, real signatures."""
    subprocess.run([REPOSITORY / "hack/cluster/tools.sh", "versitygw"], check=True, stdout=subprocess.DEVNULL)
    script = f". {REPOSITORY}/hack/cluster/env.sh && tool versitygw"
    tool = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environ = {
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench-secret",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_REGION": "us-east-1",
        }
        for name in ("data", "sidecar"):
            (pathlib.Path(folder) / name).mkdir()
        command = [f"{tool}/versitygw", "--quiet", "--port", f"127.0.0.1:{port}", "posix"]
        keys = {"ROOT_ACCESS_KEY": "bench", "ROOT_SECRET_KEY": "bench-secret", "PATH": os.environ["PATH"]}
        server = subprocess.Popen(
            [*command, "--sidecar", f"{folder}/sidecar", f"{folder}/data"],
            env=keys,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            place = Place("s3", f"s3://{BUCKET}", environ)
            _until_listening(port)
            place.boto3().create_bucket(Bucket=BUCKET)
            yield place
        finally:
            server.kill()
            server.wait()


def _until_listening(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"versitygw: expected it to listen on port {port} within 20 s")
