"""The store as commands use it: its failures become answers that a driver can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from allele.protocol.commands import ByteRange
from allele.protocol.errors import NotFound, Unavailable
from allele.store import ObjectNotFound, PopulationStore, StoreError
from allele.store.factors import Decomposition, Factors, FactorStore

Kind = Literal["segments", "states"]


class RunStore:
    """Reads and writes segments. Raises Unavailable (retry the same command), NotFound or DigestMismatch."""

    def __init__(self, population: PopulationStore) -> None:
        self._population = population

    def read(self, where: ByteRange) -> bytes:
        with _answered():
            return self._population.read(where)

    def read_many(self, where: Sequence[ByteRange]) -> list[bytes]:
        with _answered():
            return self._population.read_many(where)

    def write_segments(self, adapters: Mapping[str, bytes | memoryview], kind: Kind) -> dict[str, ByteRange]:
        with _answered():
            return self._population.write_segments(adapters, kind=kind)


class RunFactors(FactorStore):
    """Reads and keeps factors of the base. Raises Unavailable or DigestMismatch."""

    def ranks(self, decomposition: Decomposition) -> list[int]:
        with _answered():
            return super().ranks(decomposition)

    def read(self, module: str, decomposition: Decomposition, rank: int, *, sizes: tuple[int, int]) -> Factors | None:
        with _answered():
            return super().read(module, decomposition, rank, sizes=sizes)

    def create(self, module: str, decomposition: Decomposition, found: Factors) -> Factors:
        with _answered():
            return super().create(module, decomposition, found)


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except ObjectNotFound as e:
        raise NotFound(str(e)) from e
    except StoreError as e:
        raise Unavailable(f"store: {e}", retry_after=2.0) from e
