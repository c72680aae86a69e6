"""A base model is put once and fetched whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from allele.protocol.errors import DigestMismatch, InvalidRequest, NotFound
from allele.store import BaseMismatch, ObjectNotFound, Objects, bases

pytestmark = pytest.mark.everywhere

Damage = Callable[[str, Callable[[bytes], bytes]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "base"
    (source / "nested").mkdir(parents=True)
    (source / "config.json").write_text('{"hidden_size": 4}')
    (source / "model.safetensors").write_bytes(os.urandom(300_000))
    (source / "nested" / "empty.txt").write_text("")
    (source / ".cache").mkdir()
    (source / ".cache" / "junk").write_text("of a download tool")
    return source


@pytest.fixture
def objects(store_url: str) -> Objects:
    return Objects.open(store_url)


def test_the_digest_is_that_of_sha256sum(folder: Path) -> None:
    names = ["config.json", "model.safetensors", "nested/empty.txt"]
    lines = subprocess.run(["sha256sum", *names], cwd=folder, check=True, capture_output=True, text=True).stdout
    ordered = "".join(sorted(lines.splitlines(keepends=True)))
    assert bases.digest(folder) == "sha256:" + hashlib.sha256(ordered.encode()).hexdigest()


def test_a_fetched_base_equals_what_was_put(objects: Objects, folder: Path, tmp_path: Path) -> None:
    manifest = bases.put(objects, "tiny", folder)
    assert bases.put(objects, "tiny", folder) == manifest
    assert bases.fetch(objects, "tiny", tmp_path / "out", digest=manifest.digest) == manifest
    assert bases.digest(tmp_path / "out") == bases.digest(folder) == manifest.digest
    assert not (tmp_path / "out" / ".cache").exists()


def test_a_fetched_base_is_not_fetched_again(
    objects: Objects, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases.put(objects, "tiny", folder)
    bases.fetch(objects, "tiny", tmp_path / "out")
    reads: list[str] = []
    real = Objects.get_range
    monkeypatch.setattr(Objects, "get_range", lambda self, *a: reads.append(a[0]) or real(self, *a))
    bases.fetch(objects, "tiny", tmp_path / "out")
    assert reads == []
    (tmp_path / "out" / "config.json").unlink()
    bases.fetch(objects, "tiny", tmp_path / "out")
    assert reads == ["config.json"]


def test_a_folder_that_is_another_base_than_was_asked_for_is_told(
    objects: Objects, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = bases.put(objects, "tiny", folder).digest
    bases.check(folder, wanted)  # without a marker: hashed
    fetched = tmp_path / "out"
    bases.fetch(objects, "tiny", fetched)
    with monkeypatch.context() as patch:
        patch.setattr(bases, "_sha256", lambda path: pytest.fail(f"{path} was hashed again"))
        bases.check(fetched, wanted)
    with pytest.raises(BaseMismatch, match=f"expected the base sha256:other, found {wanted}"):
        bases.check(fetched, "sha256:other")
    with (fetched / "model.safetensors").open("ab") as file:
        file.write(b"more")  # the marker no longer says what is there
    with pytest.raises(BaseMismatch, match=f"expected the base {wanted}, found sha256:"):
        bases.check(fetched, wanted)


def test_an_interrupted_fetch_goes_on_where_it_stopped(
    objects: Objects, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases.put(objects, "tiny", folder)
    monkeypatch.setattr(bases, "_CHUNK", 100_000)
    real = Objects.get_range
    reads: list[tuple[str, int]] = []

    def interrupted(self: Objects, path: str, offset: int, length: int) -> bytes:
        if offset == 200_000 and not any(r == (path, offset) for r in reads):
            reads.append((path, offset))
            raise ConnectionError("the node went away")
        reads.append((path, offset))
        return real(self, path, offset, length)

    monkeypatch.setattr(Objects, "get_range", interrupted)
    with pytest.raises(ConnectionError):
        bases.fetch(objects, "tiny", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / bases.MARKER).exists()
    reads.append(("", 0))
    bases.fetch(objects, "tiny", tmp_path / "out")
    assert reads[reads.index(("", 0)) + 1 :] == [("model.safetensors", 200_000)]
    assert bases.digest(tmp_path / "out") == bases.digest(folder)


def test_a_damaged_file_is_named_and_the_base_not_marked(
    objects: Objects, folder: Path, tmp_path: Path, damage: Damage
) -> None:
    manifest = bases.put(objects, "tiny", folder)
    wanted = next(f for f in manifest.files if f.name == "model.safetensors")
    damage("bases/tiny/model.safetensors", lambda d: b"\0" + d[1:])
    with pytest.raises(
        DigestMismatch, match=f"bases/tiny/model.safetensors: expected 300000 bytes with sha256 {wanted.sha256}"
    ):
        bases.fetch(objects, "tiny", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / bases.MARKER).exists()


def test_another_base_than_asked_for_is_refused(objects: Objects, folder: Path, tmp_path: Path) -> None:
    manifest = bases.put(objects, "tiny", folder)
    with pytest.raises(BaseMismatch, match=f"base tiny: expected digest sha256:0, found {manifest.digest}"):
        bases.fetch(objects, "tiny", tmp_path / "out", digest="sha256:0")
    (folder / "config.json").write_text("{}")
    with pytest.raises(BaseMismatch, match="a base is never replaced"):
        bases.put(objects, "tiny", folder)


def test_a_base_without_manifest_does_not_exist_and_its_put_goes_on(
    objects: Objects, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Objects.put
    uploaded: list[str] = []

    def put(self: Objects, path: str, data: object) -> None:
        if path == bases.MANIFEST and not uploaded.count(path):
            uploaded.append(path)
            raise ConnectionError("killed")
        uploaded.append(path)
        real(self, path, data)  # type: ignore[arg-type]

    monkeypatch.setattr(Objects, "put", put)
    with pytest.raises(ConnectionError):
        bases.put(objects, "tiny", folder)
    with pytest.raises(NotFound, match="base tiny"):
        bases.fetch(objects, "tiny", tmp_path / "out")
    uploaded.append("again")
    bases.put(objects, "tiny", folder)
    assert uploaded[uploaded.index("again") + 1 :] == [bases.MANIFEST]
    bases.fetch(objects, "tiny", tmp_path / "out")


def test_bad_names_empty_folders_and_manifests_that_leave_the_folder_are_refused(
    objects: Objects, folder: Path, tmp_path: Path, damage: Damage
) -> None:
    with pytest.raises(InvalidRequest, match="base name"):
        bases.put(objects, "../x", folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BaseMismatch, match="found none"):
        bases.put(objects, "tiny", tmp_path / "nothing")
    bases.put(objects, "tiny", folder)
    evil = bases.BaseFile(name="../../evil", size=1, sha256="0" * 64)
    manifest = bases.BaseManifest(name="tiny", digest=bases._digest((evil,)), files=(evil,))
    damage("bases/tiny/manifest.json", lambda _: manifest.model_dump_json().encode())
    with pytest.raises(BaseMismatch, match="relative file name"):
        bases.fetch(objects, "tiny", tmp_path / "out")


def test_a_file_missing_from_the_store_is_named(objects: Objects, folder: Path, tmp_path: Path) -> None:
    bases.put(objects, "tiny", folder)
    objects.delete(["bases/tiny/config.json"])
    with pytest.raises(ObjectNotFound, match=r"bases/tiny/config\.json"):
        bases.fetch(objects, "tiny", tmp_path / "out")
