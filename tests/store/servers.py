"""S3, Google Cloud Storage and Azure Blob on this machine: versitygw, fake-gcs-server behind a front, and Azurite.

All ask who comes in. Their programs are built by the cluster's own tool script when they are not in the cache.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import boto3
from botocore.config import Config

from tests.store import gcs
from tests.store.identity import Certificate

REPOSITORY = Path(__file__).parents[2]
VERSIONS = {"versitygw": "1.8.0", "fakegcs": "1.56.1", "azurite": "3.37.0"}
BUCKET = "alleles"
ACCOUNT = "alleles"
ACCOUNT_KEY = base64.b64encode(b"store-tests-secret").decode()


@dataclasses.dataclass(frozen=True)
class S3Server:
    environ: dict[str, str]
    root: Path
    """Folder with `data` and `sidecar`, where the objects are files."""

    def client(self) -> object:
        return boto3.client(
            "s3",
            endpoint_url=self.environ["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environ["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environ["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )


@dataclasses.dataclass(frozen=True)
class GoogleServer:
    environ: dict[str, str]
    gatekeeper: gcs.Gatekeeper


@dataclasses.dataclass(frozen=True)
class AzureServer:
    environ: dict[str, str]


def tool(name: str) -> Path:
    """Folder of a program, which is built when it is not there."""
    cache = os.environ.get("ALLELE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "allele"
    )
    folder = Path(cache) / "tools" / f"{name}-{VERSIONS[name]}"
    if not folder.exists():
        subprocess.run([REPOSITORY / "hack/cluster/tools.sh", name], check=True)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: Sequence[str | Path], port: int, log: Path, **environ: str) -> Iterator[None]:
    """A server, from when it listens."""
    with log.open("wb") as out:
        env = {"PATH": os.environ["PATH"], **environ}
        server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for(port, server, log)
            yield
        finally:
            server.kill()
            server.wait()


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{server.args!r} does not listen on {port}: {log.read_text()[-2000:]}")


def versitygw() -> Path:
    """The server's binary."""
    return tool("versitygw") / "versitygw"


@contextlib.contextmanager
def serve(root: Path, *options: str) -> Iterator[S3Server]:
    """An S3 server with an empty bucket, its files below `root`."""
    port = free_port()
    environ = {
        "AWS_ACCESS_KEY_ID": "store-tests",
        "AWS_SECRET_ACCESS_KEY": "store-tests-secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
    }
    (root / "data").mkdir()
    (root / "sidecar").mkdir()
    folders = ["--sidecar", root / "sidecar", root / "data"]
    keys = {"ROOT_ACCESS_KEY": environ["AWS_ACCESS_KEY_ID"], "ROOT_SECRET_KEY": environ["AWS_SECRET_ACCESS_KEY"]}
    command = [versitygw(), "--quiet", "--port", f"127.0.0.1:{port}", *options, "posix", *folders]
    with running(command, port, root / "log", **keys):
        started = S3Server(environ, root)
        started.client().create_bucket(Bucket=BUCKET)  # type: ignore[attr-defined]
        yield started


@contextlib.contextmanager
def google(root: Path) -> Iterator[GoogleServer]:
    """With an empty bucket, in memory."""
    port = free_port()
    address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    with running([tool("fakegcs") / "fake-gcs-server", *address], port, root / "log"):
        body = json.dumps({"name": BUCKET}).encode()
        urllib.request.urlopen(f"http://127.0.0.1:{port}/storage/v1/b", body).close()
        gatekeeper = gcs.Gatekeeper()
        with gcs.front(port, gatekeeper) as url:
            environ = {"GOOGLE_SERVICE_ACCOUNT_KEY": gcs.account_key(gatekeeper.key), "GOOGLE_BASE_URL": url}
            yield GoogleServer(environ, gatekeeper)


@contextlib.contextmanager
def azure(root: Path, certificate: Certificate | None = None) -> Iterator[AzureServer]:
    """With an empty container, in memory; with a certificate, tokens are let in too."""
    port = free_port()
    program = tool("azurite") / "node_modules/azurite/dist/src/blob/main.js"
    address = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    quiet = ["--disableTelemetry", "--silent", "--skipApiVersionCheck"]
    accounts = {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
    secure: list[str | Path] = []
    if certificate is not None:
        secure = ["--oauth", "basic", "--cert", certificate.cert, "--key", certificate.key]
    with running(["node", program, *address, *quiet, *secure], port, root / "log", **accounts):
        endpoint = f"http{'s' if secure else ''}://127.0.0.1:{port}/{ACCOUNT}"
        _create_container(endpoint, BUCKET, certificate)
        yield AzureServer(
            {
                "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY,
                "AZURE_STORAGE_ENDPOINT": endpoint,
            }
        )


def signature(text: str) -> str:
    """Of Azure, with the account's key."""
    return base64.b64encode(hmac.digest(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256)).decode()


def _create_container(endpoint: str, name: str, certificate: Certificate | None) -> None:
    """Signed by hand, since obstore has no such request."""
    headers = {"x-ms-date": f"{datetime.now(UTC):%a, %d %b %Y %H:%M:%S GMT}", "x-ms-version": "2021-08-06"}
    named = "".join(f"{key}:{value}\n" for key, value in headers.items())
    text = "PUT" + "\n" * 12 + named + f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{signature(text)}"
    url = f"{endpoint}/{name}?restype=container"
    trusted = ssl.create_default_context(cafile=certificate.cert) if certificate else None
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers), context=trusted).close()
