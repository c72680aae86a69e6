"""The page table: which member is in which slot, and the rows of those that are not.

There are more members than slots and more runs than one. A member that a run has admitted may still be paged out when
another run needs the slot; it comes back, pending gradient included, when its own run's next command touches it. So
runs share the bank without knowing of each other, and results do not depend on who else is there.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from allele.protocol.commands import OptimizerSpec
from allele.protocol.errors import InvalidRequest
from allele_trainer.bank.rows import Bank, Row


@dataclasses.dataclass(frozen=True)
class Key:
    run: str
    member: str


@dataclasses.dataclass
class Page:
    """One member: in a slot, in a row or, before first use, in neither; `pending`: its gradient waits for a step."""

    scale: float
    optimizer: OptimizerSpec
    start: Callable[[Sequence[str]], list[Row]]
    """First rows of members of this run; one call for many, because it may read them from the store."""
    slot: int | None = None
    row: Row | None = None
    pending: bool = False


class PageTable:
    """Pages of one Bank, least recently used first out."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._pages: dict[Key, Page] = {}
        self._resident: collections.OrderedDict[Key, int] = collections.OrderedDict()
        self._free = list(range(bank.slots))

    @property
    def used(self) -> int:
        return len(self._resident)

    def add(self, key: Key, page: Page) -> None:
        self._pages[key] = page

    def page(self, key: Key) -> Page:
        return self._pages[key]

    def drop_run(self, run: str) -> None:
        """Forget every page of the run; its slots are free."""
        for key in [k for k in self._pages if k.run == run]:
            page = self._pages.pop(key)
            if page.slot is not None:
                self._release(key, page.slot)

    def resident(self, keys: Sequence[Key]) -> list[int]:
        """Slots of the members, after bringing in those that are out.

        Raises InvalidRequest when there are more members than slots. Starts are read before anything is moved, so an
        error of the store leaves the table as it was.
        """
        if len(keys) > self.bank.slots:
            raise InvalidRequest(
                f"members: expected at most {self.bank.slots} (slots of this shape), found {len(keys)}"
            )
        missing = [k for k in keys if self._pages[k].slot is None]
        self.materialise(missing)
        for key in keys:
            if self._pages[key].slot is not None:
                self._resident.move_to_end(key)
        wanted = set(keys)
        for key in missing:
            page = self._pages[key]
            assert page.row is not None
            slot = self._take(wanted)
            self.bank.store(slot, page.row, scale=page.scale)
            page.slot, page.row = slot, None
            self._resident[key] = slot
        return [self._resident[k] for k in keys]

    def materialise(self, keys: Iterable[Key]) -> None:
        """Give each member that has neither slot nor row the row it starts with."""
        absent = [k for k in keys if self._pages[k].slot is None and self._pages[k].row is None]
        by_source: dict[Callable[[Sequence[str]], list[Row]], list[Key]] = {}
        for key in absent:
            by_source.setdefault(self._pages[key].start, []).append(key)
        found = [
            (k, row)
            for start, ks in by_source.items()
            for k, row in zip(ks, start([k.member for k in ks]), strict=True)
        ]
        for key, row in found:
            self._pages[key].row = row

    def evict(self, keys: Iterable[Key]) -> None:
        """Write the members' rows back to host memory."""
        for key in keys:
            page = self._pages[key]
            if page.slot is not None:
                page.row = self.bank.load(page.slot, with_gradient=page.pending)
                self._release(key, page.slot)
                page.slot = None

    def evict_others(self, run: str, keep: Iterable[Key]) -> None:
        kept = set(keep)
        self.evict([k for k in self._resident if k.run == run and k not in kept])

    def row(self, key: Key) -> Row:
        """The member's row wherever it is: a copy when it is in a slot."""
        page = self._pages[key]
        if page.slot is not None:
            return self.bank.load(page.slot)
        self.materialise([key])
        assert page.row is not None
        return page.row

    def weights(self, key: Key) -> Tensor:
        """The member's weights `[P]` in host memory."""
        page = self._pages[key]
        return self.row(key).weights if page.slot is None else self.bank.weights(page.slot).to("cpu", copy=True)

    def _take(self, wanted: set[Key]) -> int:
        if not self._free:
            self.evict([next(k for k in self._resident if k not in wanted)])
        return self._free.pop(0)

    def _release(self, key: Key, slot: int) -> None:
        del self._resident[key]
        self._free.append(slot)
        self._free.sort()
