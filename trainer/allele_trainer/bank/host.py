"""Host memory for rows that are in no slot, and its bound.

Rows go least recently used first. A row that its start would give again (a seed, a saved state) is only dropped; any
other is written to the store before that, many in one segment, and read back from there. Gradients that wait for a step
stay. Pinned memory is what CUDA copies from beside the computation; torch rounds it up to a power of two.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from allele.protocol.errors import Overloaded
from allele_trainer.bank.rows import Row

if TYPE_CHECKING:
    from allele_trainer.bank.table import Key, Page, PageTable

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")

SPILL_SHARE = 8
"""A spill writes at least 1/8 of the host memory in one go, so that few objects are made."""


def free_memory() -> int:
    """Bytes this process may still take: what the machine has, or less where a control group says so."""
    free = int(psutil.virtual_memory().available)
    for limit, used in zip(_LIMITS, _USED, strict=True):
        if pathlib.Path(limit).exists() and (found := pathlib.Path(limit).read_text().strip()) != "max":
            free = min(free, int(found) - int(pathlib.Path(used).read_text()))
    return max(0, free)


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A row in host memory and whose it is."""

    table: PageTable
    key: Key
    page: Page
    nbytes: int


class HostTier:
    """The rows of all tables of a trainer that are in host memory."""

    def __init__(self, *, capacity: int, pinned: bool, spill: Callable[[Sequence[Held]], None]) -> None:
        """`capacity` in bytes; `spill` writes rows to the store and makes their pages start from there."""
        self.capacity, self._pinned, self._spill = capacity, pinned, spill
        self._alone: collections.OrderedDict[Page, Held] = collections.OrderedDict()
        self._doubles: collections.OrderedDict[Page, Held] = collections.OrderedDict()
        self._gradients = 0
        self._rows = 0
        self.dropped = self.spilled = 0
        """Rows so far that were let go because they can be read again, and that were written first."""

    @property
    def used(self) -> int:
        """Bytes of rows and gradients."""
        return self._rows + self._gradients

    def row_bytes(self, numel: int) -> int:
        return self._rounded(12 * numel)

    def gradient_bytes(self, numel: int) -> int:
        return self._rounded(4 * numel)

    def new_row(self, numel: int) -> Row:
        weights, exp_avg, exp_avg_sq = torch.empty(3, numel, pin_memory=self._pinned).unbind()
        return Row(weights, exp_avg, exp_avg_sq)

    def new_gradient(self, numel: int) -> Tensor:
        return torch.empty(numel, pin_memory=self._pinned)

    def put(self, held: Held) -> None:
        """Take a page's row into account; it is in no slot."""
        self._alone[held.page] = held
        self._rows += held.nbytes

    def double(self, page: Page) -> None:
        """The page's row is in a slot as well: it may go at any time."""
        held = self._alone.pop(page, None)
        if held is not None:
            self._doubles[page] = held

    def single(self, page: Page) -> None:
        """The page has left its slot: its row here is the only one."""
        held = self._doubles.pop(page, None)
        if held is not None:
            self._alone[page] = held

    def forget(self, page: Page) -> None:
        """The page's row is not in use any more."""
        held = self._alone.pop(page, None) or self._doubles.pop(page, None)
        if held is not None:
            self._rows -= held.nbytes
            page.row = None

    def put_gradient(self, nbytes: int) -> None:
        self._gradients += nbytes

    def forget_gradient(self, nbytes: int) -> None:
        self._gradients -= nbytes

    def make_room(self, nbytes: int, *, keep: Collection[Page], leaving: Collection[Page]) -> None:
        """Have `nbytes` free without touching the rows of `keep`, nor of `leaving`, which are about to go to slots and
        no longer count.

        Raises Overloaded when gradients take the place, or what the store raises; then nothing was lost.
        """
        if not nbytes:
            return
        keep = {*keep, *leaving}
        nbytes -= sum(self._alone[p].nbytes for p in leaving if p in self._alone)
        while self.used + nbytes > self.capacity:
            double = next((p for p in self._doubles if p not in keep), None)
            if double is not None:
                self.forget(double)
                continue
            victims = self._victims(max(self.used + nbytes - self.capacity, self.capacity // SPILL_SHARE), keep)
            if not victims:
                raise Overloaded(
                    f"host memory: expected room for {nbytes} bytes of {self.capacity} (--host-memory), found "
                    f"{self.used} taken, {self._gradients} of it by gradients that wait for their step",
                    retry_after=5.0,
                )
            unsaved = [v for v in victims if v.page.unsaved]
            if unsaved:
                self._spill(unsaved)
            self.spilled += len(unsaved)
            self.dropped += len(victims) - len(unsaved)
            for v in victims:
                self.forget(v.page)

    def _victims(self, nbytes: int, keep: Collection[Page]) -> list[Held]:
        """Least recently used rows of that size together, or until nothing is left that may go."""
        found: list[Held] = []
        size = 0
        for held in self._alone.values():
            if size >= nbytes:
                break
            if held.page not in keep:
                found.append(held)
                size += held.nbytes
        return found

    def _rounded(self, nbytes: int) -> int:
        return 1 << (nbytes - 1).bit_length() if self._pinned else nbytes
