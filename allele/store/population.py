"""PopulationStore: the folder of one population, `<store>/<namespace>/<population>/`.

Bytes go in as segments (many packed adapters one after the other in one object) and come out by range with their
sha256 checked; what exists is said by the catalogue alone. `population.json` says whose folder it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from ulid import ULID

from allele.protocol.adapters import MEMBER_NAME, POPULATION_NAME
from allele.protocol.commands import ByteRange
from allele.protocol.errors import DigestMismatch, InvalidRequest
from allele.protocol.wire import Wire
from allele.store.catalogue import Catalogue
from allele.store.errors import AlreadyExists, ObjectNotFound, OwnershipError, StoreUnavailable
from allele.store.objects import Objects, Version
from allele.store.provenance import Provenance

SegmentKind = Literal["segments", "states"]

T = TypeVar("T")

RECORD = "population.json"

SEGMENT_BYTES = 512 << 20
"""Bound of an object of many adapters, so that one upload, copy or deletion stays short."""

_USUAL = "Standard Untouched"
_CLAIMS = 8
"""Times that a claim looks again after somebody else wrote the record in between."""
RESERVED = ("bases", "factors")
"""First folders of a store that are no namespace."""


class PopulationRecord(Wire):
    """Who owns a folder; `shapes` is group → digest of its AdapterShape. Fields of later versions stay as found."""

    model_config = ConfigDict(extra="allow")

    uid: str
    base_digest: str
    shapes: dict[str, str]
    inits: dict[str, str] = Field(default_factory=dict)
    """Group → kind and base mode of its initialisation; a group that is not here has Standard, Untouched."""
    erasing: bool = False
    """What lies in the folder is being deleted for this uid: nobody may claim it until it is gone."""
    adopt: bool = Field(False, exclude=True)
    """Take over the folder of another uid (same base, same shapes), as after a namespace was made again."""


class PopulationStore:
    """Bytes, provenance and catalogue of one population. Safe to share between threads; writers are not."""

    def __init__(self, objects: Objects, *, namespace: str, population: str) -> None:
        self.objects = objects
        self.namespace = namespace
        self.population = population
        self.catalogue = Catalogue.open(objects)

    @classmethod
    def open(
        cls, url: str, *, namespace: str, population: str, environ: Mapping[str, str] = os.environ
    ) -> PopulationStore:
        """Raises InvalidRequest for a bad URL or name; does not connect."""
        return cls.of(Objects.open(url, environ), namespace=namespace, population=population)

    @classmethod
    def of(cls, store: Objects, *, namespace: str, population: str) -> PopulationStore:
        """The same over an open store, sharing its connections."""
        for field, name in (("namespace", namespace), ("population", population)):
            if not POPULATION_NAME.fullmatch(name):
                raise InvalidRequest(f"{field}: expected 1 to 63 of a-z 0-9 - (no - at the ends), found {name!r}")
        if namespace in RESERVED:
            raise InvalidRequest(f"namespace: {namespace!r} is the store's own folder; use a prefix")
        return cls(store.at(f"{namespace}/{population}"), namespace=namespace, population=population)

    def record(self) -> PopulationRecord | None:
        """The owner's record, or None before the first claim."""
        found = self.recorded()
        return found[0] if found else None

    def recorded(self) -> tuple[PopulationRecord, Version] | None:
        """The owner's record and its version, for `Objects.replace`."""
        try:
            data, version = self.objects.get_version(RECORD)
            return PopulationRecord.model_validate_json(data), version
        except ObjectNotFound:
            return None
        except ValidationError as e:
            raise OwnershipError(f"{self.objects.url(RECORD)}: expected a population record: {e}") from e

    def claim(self, record: PopulationRecord) -> None:
        """Make the folder this population's, or raise OwnershipError. Claiming again is free; groups may be added."""
        for _ in range(_CLAIMS):
            with contextlib.suppress(AlreadyExists):
                if (there := self.recorded()) is None:
                    self.objects.create(RECORD, record.model_dump_json().encode())
                    return
                found, version = there
                self._check_owner(record, found)
                merged = found.model_copy(
                    update={
                        "uid": record.uid,
                        "shapes": found.shapes | record.shapes,
                        "inits": found.inits | record.inits,
                    }
                )
                if merged != found:
                    self.objects.replace(RECORD, merged.model_dump_json().encode(), version=version)
                return
        raise StoreUnavailable(f"{self.objects.url(RECORD)}: others write it all the time; claim again")

    def _check_owner(self, record: PopulationRecord, found: PopulationRecord) -> None:
        where = self.objects.url(RECORD)
        if found.erasing:
            raise OwnershipError(
                f"{where}: expected a folder that nobody erases, found that of population {found.uid} being erased: "
                "wait until it is gone; if its erasure was given up, delete the folder or use another name"
            )
        if found.base_digest != record.base_digest:
            raise OwnershipError(
                f"{where}: base digest: expected {record.base_digest}, found {found.base_digest}; adapters of another "
                "base cannot be adopted: use another population name or prefix"
            )
        for group, digest in record.shapes.items():
            if found.shapes.get(group, digest) != digest:
                raise OwnershipError(
                    f"{where}: shape of group {group}: expected {digest}, found {found.shapes[group]}; the "
                    "group exists with another rank or other targets: use another group or population name"
                )
            init, known = record.inits.get(group, _USUAL), found.inits.get(group, _USUAL)
            if group in found.shapes and init != known:
                raise OwnershipError(
                    f"{where}: init of group {group}: expected {init}, found {known}; what is frozen "
                    "differs: use another group or population name"
                )
        if found.uid != record.uid and not record.adopt:
            raise OwnershipError(
                f"{where}: uid: expected {record.uid}, found {found.uid}; set spec.adopt to take this folder over"
            )

    def write_segments(
        self, adapters: Mapping[str, bytes | memoryview], kind: SegmentKind = "segments"
    ) -> dict[str, ByteRange]:
        """Write packed adapters (or states) of members as new objects of at most SEGMENT_BYTES each, in their order.

        Nothing refers to them until a commit does. An adapter that is larger gets an object of its own.
        """
        for member in adapters:
            if not MEMBER_NAME.fullmatch(member):
                raise InvalidRequest(f"member: expected 1 to 63 of A-Z a-z 0-9 . _ -, found {member!r}")
        views = {member: memoryview(data).cast("B") for member, data in adapters.items()}
        ranges: dict[str, ByteRange] = {}
        for members in portions(views, size=lambda m: views[m].nbytes, most=SEGMENT_BYTES):
            path = f"{kind}/{ULID()}.seg"
            offset = 0
            for member in members:
                view = views[member]
                digest = hashlib.sha256(view).hexdigest()
                ranges[member] = ByteRange(path=path, offset=offset, length=view.nbytes, digest=digest)
                offset += view.nbytes
            self.objects.put(path, (views[m] for m in members))
        return ranges

    def read(self, where: ByteRange) -> bytes:
        """The bytes of a range. Raises DigestMismatch when they are not those recorded or not all there."""
        try:
            data = self.objects.get_range(where.path, where.offset, where.length)
        except StoreUnavailable:
            self._check_length(where, self.objects.head(where.path).size)
            raise
        return self._checked(where, data)

    def read_many(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """As `read` for each, in order, neighbours of one object in one request."""
        found: dict[int, bytes] = {}
        for path, members in _by_path(ranges):
            offsets, lengths = [ranges[i].offset for i in members], [ranges[i].length for i in members]
            try:
                parts = self.objects.get_ranges(path, offsets, lengths)
            except StoreUnavailable:
                self._check_lengths([ranges[i] for i in members], self.objects.head(path).size)
                raise
            found.update((i, self._checked(ranges[i], b)) for i, b in zip(members, parts, strict=True))
        return [found[i] for i in range(len(ranges))]

    async def aread(self, where: ByteRange) -> bytes:
        """`read` without a thread."""
        try:
            data = await self.objects.aget_range(where.path, where.offset, where.length)
        except StoreUnavailable:
            self._check_length(where, (await self.objects.ahead(where.path)).size)
            raise
        return self._checked(where, data)

    async def aread_many(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """`read_many` without a thread."""
        found: dict[int, bytes] = {}
        for path, members in _by_path(ranges):
            offsets, lengths = [ranges[i].offset for i in members], [ranges[i].length for i in members]
            try:
                parts = await self.objects.aget_ranges(path, offsets, lengths)
            except StoreUnavailable:
                self._check_lengths([ranges[i] for i in members], (await self.objects.ahead(path)).size)
                raise
            found.update((i, self._checked(ranges[i], b)) for i, b in zip(members, parts, strict=True))
        return [found[i] for i in range(len(ranges))]

    def write_provenance(self, provenance: Provenance) -> str:
        """Store it under its sha256 and return that.

        Written even if it is there: a refused create does not prove that (S3 answers 409 to a race that both may
        lose), and what an earlier attempt left may be collected at any time but for its new date.
        """
        sha = provenance.sha256
        self.objects.put(f"provenance/{sha}.json", provenance.encode())
        return sha

    def read_provenance(self, sha256: str) -> Provenance:
        """Raises ObjectNotFound, or DigestMismatch when the stored bytes are not those of the name."""
        path = f"provenance/{sha256}.json"
        data = self.objects.get(path)
        self._checked(ByteRange(path=path, offset=0, length=max(1, len(data)), digest=sha256), data)
        return Provenance.decode(data)

    def _checked(self, where: ByteRange, data: bytes) -> bytes:
        self._check_length(where, where.offset + len(data))
        found = hashlib.sha256(data).hexdigest()
        if found != where.digest:
            raise DigestMismatch(
                f"{self.objects.url(where.path)} at {where.offset}, {where.length} bytes: expected sha256 "
                f"{where.digest}, found {found}"
            )
        return data

    def _check_length(self, where: ByteRange, end: int) -> None:
        if end < where.offset + where.length:
            raise DigestMismatch(
                f"{self.objects.url(where.path)} at {where.offset}: expected {where.length} bytes with sha256 "
                f"{where.digest}, found {max(0, end - where.offset)} bytes: the object is truncated"
            )

    def _check_lengths(self, ranges: Iterable[ByteRange], end: int) -> None:
        for where in ranges:
            self._check_length(where, end)


def portions(items: Iterable[T], *, size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Items in their order, in parts of at most `most` together, or of one that is larger."""
    part: list[T] = []
    total = 0
    for item in items:
        if part and total + size(item) > most:
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part


def chunks(ranges: Iterable[ByteRange], *, most: int) -> Iterator[list[ByteRange]]:
    """Ranges in their order, in parts of one object and of at most `most` bytes, or of one larger range."""
    for _, some in groupby(ranges, key=lambda r: r.path):
        yield from portions(some, size=lambda r: r.length, most=most)


def _by_path(ranges: Sequence[ByteRange]) -> Iterator[tuple[str, list[int]]]:
    """Object → positions in `ranges` of what is wanted from it."""
    paths: dict[str, list[int]] = {}
    for i, r in enumerate(ranges):
        paths.setdefault(r.path, []).append(i)
    yield from paths.items()
