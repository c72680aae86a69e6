"""The run's side of the catalogue: its writer and the index of what is known.

Everything here blocks on the store, so it runs in a thread; an outage is waited out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from allele.store import Fact, Index, PopulationStore, Provenance, Writer
from allele_driver.metrics import COMMITTED, EXPOSED
from allele_driver.patience import Patience


class Ledger:
    """One run's right to commit."""

    def __init__(self, store: PopulationStore, writer: Writer, index: Index, patience: Patience) -> None:
        self._store = store
        self._writer = writer
        self._patience = patience
        self.index = index

    @classmethod
    async def open(cls, store: PopulationStore, *, run: str, patience: Patience) -> Ledger:
        """Become the run's only writer; older drivers are fenced off."""
        writer = await patience.until("store", lambda: asyncio.to_thread(store.catalogue.start, run))
        index = Index(store.catalogue)
        index.apply(await patience.until("store", lambda: asyncio.to_thread(index.fetch)))
        return cls(store, writer, index, patience)

    @property
    def fence(self) -> int:
        """Also the epoch of the run at the trainer."""
        return self._writer.fence

    @property
    def last_step(self) -> int | None:
        return self._writer.last_step

    async def write(self, provenance: Provenance) -> str:
        """Its sha256, to be named by facts."""
        return await self._patience.until("store", lambda: asyncio.to_thread(self._store.write_provenance, provenance))

    async def read(self, sha256: str) -> Provenance:
        return await self._patience.until("store", lambda: asyncio.to_thread(self._store.read_provenance, sha256))

    async def commit(self, step: int, facts: Sequence[Fact]) -> int:
        """All or none of the facts of a step; the version that holds them. Raises FencedError."""
        version = await self._patience.until("store", lambda: asyncio.to_thread(self._writer.commit, step, facts))
        changes = await self._patience.until("store", lambda: asyncio.to_thread(self.index.fetch))
        self.index.apply(changes)
        await asyncio.to_thread(self.index.fold)
        COMMITTED.inc(sum(f.kind == "Committed" for f in facts))
        EXPOSED.inc(sum(f.kind == "Exposed" for f in facts))
        return version
