"""Base models in the store: `<store>/bases/<name>/` with a manifest, put once and fetched by every pod.

A base is named by the digest of its files: sha256 over the sorted lines `<sha256>  <name>`. Files stream in both
directions, never whole in memory. The manifest is written last, so a base without one does not exist; an interrupted
put or fetch goes on where it stopped. A fetched folder carries a marker, the manifest itself, written last, so that a
restarted pod starts at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from allele.protocol.adapters import MEMBER_NAME
from allele.protocol.errors import DigestMismatch, InvalidRequest, NotFound
from allele.protocol.wire import Wire
from allele.store.errors import BaseMismatch, ObjectNotFound
from allele.store.objects import Objects

MANIFEST = "manifest.json"
MARKER = ".allele-base.json"
_PARTIAL = ".partial"
_CHUNK = 16 << 20
"""Bytes per ranged read; with the files in parallel this bounds the memory of a fetch."""

_PARALLEL_FILES = 4


class BaseFile(Wire):
    name: str
    size: int
    sha256: str


class BaseManifest(Wire):
    """What a base consists of; `digest` is `sha256:<hex>`."""

    name: str
    digest: str
    files: tuple[BaseFile, ...]


def digest(directory: str | Path) -> str:
    """`sha256:<hex>` of a folder's files; hidden files, such as caches of a download tool, do not count."""
    return _digest(scan(directory))


def scan(directory: str | Path) -> tuple[BaseFile, ...]:
    """The files of a base folder, hashed, sorted by name. Raises BaseMismatch when there are none."""
    folder = Path(directory)
    names = sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not names:
        raise BaseMismatch(f"{folder}: expected the files of a base model, found none")
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        sums = list(pool.map(lambda name: _sha256(folder / name), names))
    return tuple(BaseFile(name=n, size=(folder / n).stat().st_size, sha256=s) for n, s in zip(names, sums, strict=True))


def manifest(store: Objects, name: str) -> BaseManifest:
    """Raises NotFound for a base that was never put completely."""
    folder = _folder(store, name)
    try:
        return BaseManifest.model_validate_json(folder.get(MANIFEST))
    except ObjectNotFound as e:
        raise NotFound(f"base {name}: expected {folder.url(MANIFEST)}, found nothing; put the base first") from e
    except ValidationError as e:
        raise BaseMismatch(f"{folder.url(MANIFEST)}: expected a base manifest: {e}") from e


def put(store: Objects, name: str, directory: str | Path) -> BaseManifest:
    """Upload a folder as base `name`. Putting the same again is free; other content under the name is BaseMismatch."""
    folder = _folder(store, name)
    files = scan(directory)
    wanted = BaseManifest(name=name, digest=_digest(files), files=files)
    with contextlib.suppress(NotFound):
        found = manifest(store, name)
        if found.digest != wanted.digest:
            raise BaseMismatch(
                f"base {name}: expected {wanted.digest} (of {directory}), found {found.digest} in the store; "
                "a base is never replaced: choose another name"
            )
        return found
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(lambda f: _upload(folder, f, Path(directory)), files))
    folder.put(MANIFEST, wanted.model_dump_json().encode())
    return wanted


def fetch(store: Objects, name: str, directory: str | Path, *, digest: str | None = None) -> BaseManifest:
    """Download base `name` into a folder and check every file; nothing to do when its marker says it is there.

    Raises NotFound, BaseMismatch when the store's base is not `digest`, and DigestMismatch naming a damaged file.
    """
    target = Path(directory)
    wanted = manifest(store, name)
    if digest is not None and wanted.digest != digest:
        raise BaseMismatch(f"base {name}: expected digest {digest}, found {wanted.digest} in {store.url('bases')}")
    if wanted.digest != _digest(wanted.files):
        raise BaseMismatch(f"base {name}: manifest says {wanted.digest}, its files give {_digest(wanted.files)}")
    marker = target / MARKER
    marked = _marker(target)
    if marked and marked.digest == wanted.digest and _has_files(target, wanted):
        return wanted
    target.mkdir(parents=True, exist_ok=True)
    folder = _folder(store, name)
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(lambda f: _download(folder, f, target), wanted.files))
    temporary = marker.with_name(MARKER + _PARTIAL)
    temporary.write_text(wanted.model_dump_json() + "\n")
    temporary.replace(marker)
    return wanted


def check(directory: str | Path, wanted: str) -> None:
    """Raises BaseMismatch unless a folder is the base of this digest; one that `fetch` marked is not hashed again."""
    folder = Path(directory)
    marked = _marker(folder)
    found = marked.digest if marked and _has_files(folder, marked) else digest(folder)
    if found != wanted:
        raise BaseMismatch(f"{folder}: expected the base {wanted}, found {found}; fetch the base that was asked for")


def _folder(store: Objects, name: str) -> Objects:
    if not MEMBER_NAME.fullmatch(name):
        raise InvalidRequest(f"base name: expected 1 to 63 of A-Z a-z 0-9 . _ -, found {name!r}")
    return store.at(f"bases/{name}")


def _digest(files: tuple[BaseFile, ...]) -> str:
    lines = sorted(f"{f.sha256}  {f.name}\n" for f in files)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _upload(folder: Objects, file: BaseFile, source: Path) -> None:
    """The sum beside an object is written after it: with both there, an earlier attempt has uploaded this very file."""
    sum_path = f".sha256/{file.name}"
    with contextlib.suppress(ObjectNotFound):
        if folder.get(sum_path) == file.sha256.encode() and folder.head(file.name).size == file.size:
            return
    folder.put(file.name, source / file.name)
    folder.put(sum_path, file.sha256.encode())


def _download(folder: Objects, file: BaseFile, target: Path) -> None:
    final = _inside(target, file.name)
    if final.is_file() and final.stat().st_size == file.size and _sha256(final) == file.sha256:
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(final.name + _PARTIAL)
    with partial.open("a+b") as out:
        out.seek(0)
        hasher = hashlib.file_digest(out, "sha256")
        done = out.seek(0, os.SEEK_END)
        while done < file.size:
            data = folder.get_range(file.name, done, min(_CHUNK, file.size - done))
            if not data:
                break
            out.write(data)
            hasher.update(data)
            done += len(data)
    if done != file.size or hasher.hexdigest() != file.sha256:
        partial.unlink()
        raise DigestMismatch(
            f"{folder.url(file.name)}: expected {file.size} bytes with sha256 {file.sha256}, found {done} bytes with "
            f"{hasher.hexdigest()}; put the base again under another name"
        )
    partial.replace(final)


def _inside(target: Path, name: str) -> Path:
    """A manifest is data: its names may not lead out of the folder."""
    path = target / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BaseMismatch(f"manifest: expected a relative file name, found {name!r}")
    return path


def _marker(folder: Path) -> BaseManifest | None:
    try:
        found = BaseManifest.model_validate_json((folder / MARKER).read_text())
    except (FileNotFoundError, ValidationError):
        return None
    return found if found.digest == _digest(found.files) else None


def _has_files(folder: Path, base: BaseManifest) -> bool:
    """Whether its files are there; sizes are compared, contents are not hashed again."""
    return all((path := folder / f.name).is_file() and path.stat().st_size == f.size for f in base.files)
