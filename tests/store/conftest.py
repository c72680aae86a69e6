"""Every store test runs twice: over a folder, and over a real S3 server with real signatures (versitygw)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from allele.protocol.commands import ByteRange
from allele.store import Fact, PopulationStore
from tests.store.crash import Laboratory
from tests.store.proxy import Proxy

REPOSITORY = Path(__file__).parents[2]
VERSITYGW = "1.8.0"
BUCKET = "alleles"


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


def versitygw() -> Path:
    """The server's binary; built by the cluster's own tool script when it is not in the cache."""
    cache = os.environ.get("ALLELE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "allele"
    )
    binary = Path(cache) / "tools" / f"versitygw-{VERSITYGW}" / "versitygw"
    if not binary.exists():
        subprocess.run([REPOSITORY / "hack/cluster/tools.sh", "versitygw"], check=True)
    return binary


@contextlib.contextmanager
def serve(root: Path, *options: str) -> Iterator[S3Server]:
    """An S3 server with an empty bucket, its files below `root`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {
        "AWS_ACCESS_KEY_ID": "store-tests",
        "AWS_SECRET_ACCESS_KEY": "store-tests-secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
    }
    (root / "data").mkdir()
    (root / "sidecar").mkdir()
    folders = ["--sidecar", root / "sidecar", root / "data"]
    log = (root / "log").open("wb")
    server = subprocess.Popen(
        [versitygw(), "--quiet", "--port", f"127.0.0.1:{port}", *options, "posix", *folders],
        env={
            "PATH": os.environ["PATH"],
            "ROOT_ACCESS_KEY": environ["AWS_ACCESS_KEY_ID"],
            "ROOT_SECRET_KEY": environ["AWS_SECRET_ACCESS_KEY"],
        },
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(port, server, root / "log")
        started = S3Server(environ, root)
        started.client().create_bucket(Bucket=BUCKET)  # type: ignore[attr-defined]
        yield started
    finally:
        server.kill()
        server.wait()
        log.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with Proxy.start(s3_server.environ) as started:
        yield started


@pytest.fixture(scope="session")
def laboratory(s3_server: S3Server, proxy: Proxy) -> Laboratory:
    return Laboratory(s3_server.environ, s3_server.root, proxy, bucket=BUCKET)


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"versitygw does not listen on {port}: {log.read_text()[-2000:]}")


@pytest.fixture
def s3_environ(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, its credentials in this process's environment."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environ.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(params=["file", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    request.getfixturevalue("s3_environ")
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def store(store_url: str) -> PopulationStore:
    return PopulationStore.open(store_url, namespace="team", population="users")


@pytest.fixture
def damage(
    store_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[str, Callable[[bytes], bytes]], None]:
    """Change an object (path below the store) behind the store's back."""

    def change(path: str, edit: Callable[[bytes], bytes]) -> None:
        if store_url.startswith("file:"):
            file = tmp_path / "store" / path
            file.write_bytes(edit(file.read_bytes()))
            return
        s3 = request.getfixturevalue("s3_server").client()
        where = {"Bucket": BUCKET, "Key": f"{store_url.rsplit('/', 1)[1]}/{path}"}
        s3.put_object(**where, Body=edit(s3.get_object(**where)["Body"].read()))

    return change


@pytest.fixture
def committed(store: PopulationStore) -> Callable[..., Fact]:
    """Builds a Committed fact over real bytes: committed("m", 1)."""

    def build(
        member: str, revision: int, *, data: bytes = b"", state: ByteRange | None = None, **fields: object
    ) -> Fact:
        written = store.write_segment({member: data or f"{member}@{revision}".encode()})
        return Fact.committed(
            member=member, revision=revision, weights=written[member], state=state, shape="shape", **fields
        )

    return build
