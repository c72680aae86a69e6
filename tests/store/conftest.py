"""Every store test runs over a folder and over S3 (versitygw); with the marker `everywhere` over Google Cloud Storage
(fake-gcs-server behind a front) and Azure Blob (Azurite) too. The servers ask for credentials."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from allele.protocol.commands import ByteRange
from allele.store import Fact, Objects, PopulationStore
from tests.store.crash import Laboratory
from tests.store.proxy import Proxy
from tests.store.servers import BUCKET, AzureServer, GoogleServer, S3Server, azure, google, serve


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


@pytest.fixture(scope="session")
def gs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleServer]:
    with google(tmp_path_factory.mktemp("gs")) as server:
        yield server


@pytest.fixture(scope="session")
def az_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    with azure(tmp_path_factory.mktemp("az")) as server:
        yield server


def enter(environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a server's credentials, and no others, into this process's environment."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "GOOGLE_", "GCE_", "STORAGE_EMULATOR", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3_environ(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, its credentials in this process's environment."""
    enter(s3_server.environ, monkeypatch)
    return s3_server


@pytest.fixture(params=["s3", "gs", "az"])
def bucket_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store of each provider, its credentials in this process's environment."""
    enter(request.getfixturevalue(f"{request.param}_server").environ, monkeypatch)
    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of a store run over a folder and S3; those that ask something of the provider, over each that there is."""
    if "store_url" in metafunc.fixturenames:
        everywhere = metafunc.definition.get_closest_marker("everywhere")
        kinds = ["file", "s3", "gs", "az"] if everywhere else ["file", "s3"]
        metafunc.parametrize("store_url", kinds, indirect=True)


@pytest.fixture
def store_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store, its credentials in this process's environment."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    enter(request.getfixturevalue(f"{request.param}_server").environ, monkeypatch)
    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def store(store_url: str) -> PopulationStore:
    return PopulationStore.open(store_url, namespace="team", population="users")


@pytest.fixture
def damage(store_url: str) -> Callable[[str, Callable[[bytes], bytes]], None]:
    """Change an object (path below the store) behind the store's back."""

    def change(path: str, edit: Callable[[bytes], bytes]) -> None:
        objects = Objects.open(store_url)
        objects.put(path, edit(objects.get(path)))

    return change


@pytest.fixture
def committed(store: PopulationStore) -> Callable[..., Fact]:
    """Builds a Committed fact over real bytes: committed("m", 1)."""

    def build(
        member: str, revision: int, *, data: bytes = b"", state: ByteRange | None = None, **fields: object
    ) -> Fact:
        written = store.write_segments({member: data or f"{member}@{revision}".encode()})
        return Fact.committed(
            member=member, revision=revision, weights=written[member], state=state, shape="shape", **fields
        )

    return build
