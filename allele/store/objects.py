"""Objects of a store by URL: bytes in and out of a bucket or a folder, with one set of errors.

`address` says which URLs there are and where credentials come from. Requests are retried with exponential backoff and
jitter by obstore; a create-only write whose answer was lost may therefore report AlreadyExists for its own object, so
callers either use unique names or compare what they find.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore

from allele.store.address import Address
from allele.store.backends import Backend, connect, delta_options
from allele.store.errors import AlreadyExists, ObjectNotFound, StoreRefused, StoreUnavailable

PART_BYTES = 8 << 20
"""Size of a multipart part; larger objects are uploaded in parallel parts of this size."""

_PARALLEL_PARTS = 8
_COALESCE = 1 << 20
"""Bytes between two ranges that are cheaper to fetch than a second request."""

_REFUSED = re.compile(r"status code: 40[13]\b")
"""How obstore says of a listing what of other requests is an error of its own."""


@dataclasses.dataclass(frozen=True)
class ObjectInfo:
    path: str
    size: int
    modified: datetime
    """By the store's clock."""


Version = Mapping[str, str]
"""What tells one content of an object from the next: its etag, its generation, or both, by provider."""


class Objects:
    """A folder of a store; `at` gives a folder below it over the same connections. Safe to share between threads."""

    def __init__(self, backend: Backend, *, root: str, prefix: str, options: Mapping[str, str]) -> None:
        self._backend = backend
        self._root = root
        self._prefix = prefix
        self.delta_options = dict(options)
        """`storage_options` of deltalake for this store."""

    @classmethod
    def open(cls, url: str, environ: Mapping[str, str] = os.environ) -> Objects:
        """Raises InvalidRequest for another URL and for a missing variable, StoreRefused for credentials that are no
        credentials; does not connect."""
        address = Address.parse(url)
        options = address.options(environ)
        backend = connect(address, options)
        if address.scheme == "file":
            return cls(backend, root=f"file:///{address.prefix}", prefix="", options={})
        root = f"{address.scheme}://{address.bucket}"
        return cls(backend, root=root, prefix=address.prefix, options=delta_options(address, options))

    def at(self, folder: str) -> Objects:
        return Objects(self._backend, root=self._root, prefix=self._key(folder), options=self.delta_options)

    def url(self, path: str = "") -> str:
        return f"{self._root}/{self._key(path)}".rstrip("/")

    def get(self, path: str) -> bytes:
        with self._errors(path):
            return bytes(obstore.get(self._backend, self._key(path)).bytes())

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        """May return fewer bytes than `length` where the object ends, or raise when it starts beyond the end."""
        with self._errors(path):
            return bytes(obstore.get_range(self._backend, self._key(path), start=offset, length=length))

    def get_ranges(self, path: str, offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Neighbouring ranges are fetched in one request. A range may come shorter, as in `get_range`."""
        spans = _spans(offsets, lengths)
        starts, ends = [s.start for s in spans], [s.end for s in spans]
        with self._errors(path):
            found = obstore.get_ranges(self._backend, self._key(path), starts=starts, ends=ends)
        return _cut(spans, found, offsets, lengths)

    async def aget(self, path: str) -> bytes:
        with self._errors(path):
            result = await obstore.get_async(self._backend, self._key(path))
            return bytes(await result.bytes_async())

    async def aget_range(self, path: str, offset: int, length: int) -> bytes:
        with self._errors(path):
            return bytes(await obstore.get_range_async(self._backend, self._key(path), start=offset, length=length))

    async def aget_ranges(self, path: str, offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        spans = _spans(offsets, lengths)
        starts, ends = [s.start for s in spans], [s.end for s in spans]
        with self._errors(path):
            found = await obstore.get_ranges_async(self._backend, self._key(path), starts=starts, ends=ends)
        return _cut(spans, found, offsets, lengths)

    def put(self, path: str, data: bytes | memoryview | Path | Iterable[bytes | memoryview]) -> None:
        """Write or replace, atomically; iterables and files go up in parallel parts, never whole in memory."""
        with self._errors(path):
            obstore.put(self._backend, self._key(path), data, chunk_size=PART_BYTES, max_concurrency=_PARALLEL_PARTS)

    def create(self, path: str, data: bytes) -> None:
        """Write only where nothing is. Raises AlreadyExists."""
        with self._errors(path):
            obstore.put(self._backend, self._key(path), data, mode="create")

    def get_version(self, path: str) -> tuple[bytes, Version]:
        """The object, and which version of it this is, for `replace`."""
        with self._errors(path):
            found = obstore.get(self._backend, self._key(path))
            return bytes(found.bytes()), _version(found.meta)

    def replace(self, path: str, data: bytes, *, version: Version) -> None:
        """Write over the version that was read. Raises AlreadyExists when the object is another one by now.

        A folder has no such write: there it is looked at first, and of two writers at once both may get through.
        """
        with self._errors(path):
            if not isinstance(self._backend, LocalStore):
                obstore.put(self._backend, self._key(path), data, mode=dict(version))
                return
            if _version(obstore.head(self._backend, self._key(path))) != version:
                raise PreconditionError("changed meanwhile")
            obstore.put(self._backend, self._key(path), data)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects below a folder, with paths relative to this one."""
        skip = len(self._prefix) + 1 if self._prefix else 0
        with self._errors(prefix):
            for batch in obstore.list(self._backend, prefix=self._key(prefix)):
                for meta in batch:
                    yield ObjectInfo(meta["path"][skip:], meta["size"], meta["last_modified"])

    def folders(self, prefix: str = "") -> Sequence[str]:
        """Names of the folders directly below a folder, without looking inside them."""
        with self._errors(prefix):
            found = obstore.list_with_delimiter(self._backend, prefix=self._key(prefix) or None)
        return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in found["common_prefixes"])

    def delete(self, paths: Sequence[str]) -> None:
        """Objects that are already gone are fine."""
        for path in paths:
            with contextlib.suppress(ObjectNotFound), self._errors(path):
                obstore.delete(self._backend, self._key(path))

    def head(self, path: str) -> ObjectInfo:
        with self._errors(path):
            meta = obstore.head(self._backend, self._key(path))
        return ObjectInfo(path, meta["size"], meta["last_modified"])

    async def ahead(self, path: str) -> ObjectInfo:
        with self._errors(path):
            meta = await obstore.head_async(self._backend, self._key(path))
        return ObjectInfo(path, meta["size"], meta["last_modified"])

    def _key(self, path: str) -> str:
        return "/".join(p for p in (self._prefix, path.strip("/")) if p)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """obstore's errors → ours, naming the object."""
        where = self.url(path)
        try:
            yield
        except FileNotFoundError as e:
            raise ObjectNotFound(f"{where}: no such object") from e
        except (AlreadyExistsError, PreconditionError) as e:
            raise AlreadyExists(f"{where}: already there") from e
        except (PermissionDeniedError, UnauthenticatedError) as e:
            raise StoreRefused(f"{where}: credentials refused: {_first_line(e)}") from e
        except (BaseError, OSError) as e:
            if _REFUSED.search(_first_line(e)):
                raise StoreRefused(f"{where}: credentials refused: {_first_line(e)}") from e
            raise StoreUnavailable(f"{where}: {_first_line(e)}") from e


def _version(meta: Any) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


@dataclasses.dataclass(slots=True)
class _Span:
    """Bytes that one request brings, and which of the ranges lie in them."""

    start: int
    end: int
    ranges: list[int]


def _spans(offsets: Sequence[int], lengths: Sequence[int]) -> list[_Span]:
    """Merged here, since obstore panics when it cuts merged ranges out of an object that ends before them."""
    spans: list[_Span] = []
    for i in sorted(range(len(offsets)), key=lambda i: offsets[i]):
        start, end = offsets[i], offsets[i] + lengths[i]
        if spans and start - spans[-1].end <= _COALESCE:
            spans[-1].end = max(spans[-1].end, end)
            spans[-1].ranges.append(i)
        else:
            spans.append(_Span(start, end, [i]))
    return spans


def _cut(spans: Sequence[_Span], found: Sequence[Any], offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    parts = [b""] * len(offsets)
    for span, data in zip(spans, found, strict=True):
        view = memoryview(data)
        for i in span.ranges:
            parts[i] = bytes(view[offsets[i] - span.start :][: lengths[i]])
    return parts


def _first_line(error: Any) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
