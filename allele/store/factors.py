"""Factors of a base's weights, computed once for all adapters, ranks and trainers that start from them:

    <store>/factors/<hex of the base's digest>/<decomposition>-<rank>/<module>.safetensors

`decomposition` is Largest, Smallest (singular triplets of that end) or QR; `module` is the name of a weight without
`.weight`. An object is created only where none is, so of two who compute the same both go on with the first one's
bytes. It is an ordinary safetensors file with a header that is constant for its sizes: `left` [out, r], `values` [r]
(of QR: ones), `right` [r, in] in fp32, and `sha256` of these three as 32 bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from allele.format import ShapeMismatch, header
from allele.protocol.errors import DigestMismatch
from allele.store.errors import AlreadyExists, ObjectNotFound
from allele.store.objects import Objects

Decomposition = Literal["Largest", "Smallest", "QR"]
FOLDER = "factors"


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """Rank by rank, from the largest singular value to the smallest, or in the order of QR's columns."""

    left: NDArray[np.float32]
    values: NDArray[np.float32]
    right: NDArray[np.float32]

    @property
    def rank(self) -> int:
        return int(self.values.size)

    def some(self, decomposition: Decomposition, rank: int) -> Factors:
        """Of a smaller rank: of the smallest singular values the last, else the first."""
        part = slice(self.rank - rank, None) if decomposition == "Smallest" else slice(rank)
        return Factors(self.left[:, part], self.values[part], self.right[part])


class FactorStore:
    """Factors of one base in a store. Safe to share between threads."""

    def __init__(self, store: Objects, base_digest: str) -> None:
        self.objects = store.at(f"{FOLDER}/{base_digest.removeprefix('sha256:')}")

    def ranks(self, decomposition: Decomposition) -> list[int]:
        """Ranks of which there are any factors, ascending."""
        found = (name.rpartition("-") for name in self.objects.folders())
        return sorted(int(rank) for kind, _, rank in found if kind == decomposition)

    def read(self, module: str, decomposition: Decomposition, rank: int, *, sizes: tuple[int, int]) -> Factors | None:
        """Factors of a weight of `sizes` (out, in), None where there are none.

        Raises DigestMismatch for damaged bytes: they are not computed again in silence, since somebody may have
        started from others.
        """
        path = _path(module, decomposition, rank)
        try:
            return _decoded(self.objects.get(path), sizes=sizes, rank=rank, where=self.objects.url(path))
        except ObjectNotFound:
            return None

    def create(self, module: str, decomposition: Decomposition, found: Factors) -> Factors:
        """Keep them, unless somebody was first: gives what the store has now."""
        path, rank = _path(module, decomposition, found.rank), found.rank
        sizes = found.left.shape[0], found.right.shape[1]
        data = _encoded(found, sizes=sizes)
        try:
            self.objects.create(path, data)
        except AlreadyExists:
            data = self.objects.get(path)
        return _decoded(data, sizes=sizes, rank=rank, where=self.objects.url(path))


def _path(module: str, decomposition: Decomposition, rank: int) -> str:
    return f"{decomposition}-{rank}/{module}.safetensors"


def _entries(sizes: tuple[int, int], rank: int) -> tuple[header.Entry, ...]:
    out, into = sizes
    found: list[header.Entry] = []
    at = 0
    for name, shape in (("left", (out, rank)), ("values", (rank,)), ("right", (rank, into))):
        end = at + 4 * int(np.prod(shape))
        found.append(header.Entry(name, "F32", shape, at, end))
        at = end
    return (*found, header.Entry("sha256", "U8", (32,), at, at + 32))


def _encoded(found: Factors, *, sizes: tuple[int, int]) -> bytes:
    numbers = b"".join(np.ascontiguousarray(a, "<f4").tobytes() for a in (found.left, found.values, found.right))
    entries = _entries(sizes, found.rank)
    return header.build(entries, {}) + numbers + hashlib.sha256(numbers).digest()


def _decoded(data: bytes, *, sizes: tuple[int, int], rank: int, where: str) -> Factors:
    entries = _entries(sizes, rank)
    try:
        body = header.check(memoryview(data), header.build(entries, {}), entries, where)
    except ShapeMismatch as e:
        raise DigestMismatch(f"{where}: {e}; delete the file, it is computed again") from e
    numbers, expected = body[: entries[-1].start], bytes(body[entries[-1].start :])
    actual = hashlib.sha256(numbers).digest()
    if actual != expected:
        raise DigestMismatch(
            f"{where}: expected sha256 {expected.hex()}, found {actual.hex()}; delete the file, it is computed again"
        )
    left, values, right = (np.frombuffer(numbers[e.start : e.end], "<f4").reshape(e.shape) for e in entries[:-1])
    return Factors(left, values, right)
