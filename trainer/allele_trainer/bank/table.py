"""The page table: which member is in which slot, and where the rows are that are in none.

There are more members than slots and more runs than one. A member that a run has admitted may still be paged out when
another run needs the slot; it comes back, pending gradient included, when its own run's next command touches it. So
runs share the bank without knowing of each other, and results do not depend on who else is there.

A row leaves its slot for host memory only if it changed since it came: one that did not is still there, or its start
gives it again. Nothing here grows with the number of tensors of an adapter, and a member that was never touched is a
page without a row.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from allele.protocol.commands import ByteRange, OptimizerSpec
from allele.protocol.errors import InvalidRequest, ProtocolError
from allele_trainer.agreement import agreed
from allele_trainer.bank.host import Held, HostTier
from allele_trainer.bank.rows import Bank, Row
from allele_trainer.parallel import Ranks


class Key(NamedTuple):
    run: str
    member: str


class Start(Protocol):
    """Where rows of members of one run come from when they are in neither slot nor host memory."""

    def rows(self, members: Sequence[str]) -> list[Row]:
        """Whole rows; one call for many, because it may read them from the store."""

    def moved(self, member: str, state: ByteRange) -> None:
        """From now on the member's row is this state."""


@dataclasses.dataclass(slots=True, eq=False)
class Page:
    """One member. Its newest row is in `slot`, else in `row`, else what `start` gives."""

    scale: float
    optimizer: OptimizerSpec
    start: Start
    trained: Tensor | None = None
    """`[P]` of ones and zeros on the bank's device: what of the row trains. None: all."""
    slot: int | None = None
    row: Row | None = None
    """In host memory. Beside a slot only while both are the same."""
    gradient: Tensor | None = None
    """In host memory, when it was evicted between gradient and step."""
    pending: bool = False
    """A gradient waits for a step."""
    unsaved: bool = False
    """`start` would give another row than the newest one."""


class PageTable:
    """Pages of one Bank, least recently used first out."""

    def __init__(self, bank: Bank, host: HostTier, ranks: Ranks) -> None:
        """Raises InvalidRequest when host memory does not hold one row with its gradient."""
        self.bank, self._host, self._ranks = bank, host, ranks
        place = ranks.place
        # The same on every rank, so that all of them run out of host memory at the same row.
        part = -(-bank.shape.numel // (place.tp * place.pp))
        self._row_bytes, self._gradient_bytes = host.row_bytes(part), host.gradient_bytes(part)
        least = self._row_bytes + self._gradient_bytes
        if host.capacity < least:
            raise InvalidRequest(
                f"host memory: expected at least {least} bytes for one adapter of rank {bank.shape.rank}, found "
                f"{host.capacity} (--host-memory)"
            )
        self._pages: dict[str, dict[str, Page]] = {}
        self._resident: collections.OrderedDict[Key, int] = collections.OrderedDict()
        self._free = list(range(bank.slots))
        self._reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: dict[Key, tuple[concurrent.futures.Future[list[Row]], int]] = {}
        self.loaded = self.written_back = self.clean = 0
        """Rows so far that came into slots, that left them for host memory, and that left unchanged."""

    @property
    def used(self) -> int:
        return len(self._resident)

    def add(self, key: Key, page: Page) -> None:
        self._pages.setdefault(key.run, {})[key.member] = page

    def page(self, key: Key) -> Page:
        return self._pages[key.run][key.member]

    def drop_run(self, run: str) -> None:
        """Forget every page of the run; its slots are free."""
        for member, page in self._pages.pop(run, {}).items():
            if page.slot is not None:
                self._leave(Key(run, member), page)
            self._host.forget(page)
            self._drop_gradient(page)
        self._ahead = {k: v for k, v in self._ahead.items() if k.run != run}

    def resident(self, keys: Sequence[Key], *, gradients: bool = False) -> list[int]:
        """Slots of the members, after bringing in those that are out; with `gradients`, each has a gradient row.

        Raises InvalidRequest when there are more members than slots or gradient rows. Starts are read and host memory
        is found before anything is moved, so an error of the store leaves the table as it was.
        """
        most = self.bank.gradients if gradients else self.bank.slots
        if len(keys) > most:
            raise InvalidRequest(
                f"members: expected at most {most} ({'gradient rows' if gradients else 'slots'} of this shape), found "
                f"{len(keys)}"
            )
        for key in keys:
            if key in self._resident:
                self._resident.move_to_end(key)
        self._bring(keys, keep=set(keys))
        if gradients:
            self._lend(keys)
        self.bank.stream.arrive()
        return [self._resident[k] for k in keys]

    def prefetch(self, keys: Sequence[Key], *, keep: Collection[Key]) -> None:
        """Begin to bring members in: rows in host memory go to slots that neither `keep` nor another run uses, beside
        the computation; rows that are not are read in a thread. Never fails: `resident` does what this did not."""
        missing = [k for k in keys if self.page(k).slot is None]
        self._read_ahead([k for k in missing if self.page(k).row is None and k not in self._ahead])
        ready = [k for k in missing if self.page(k).row is not None]
        idle = [k for k in self._resident if k.run == keys[0].run and k not in keep and k not in keys] if keys else []
        room = len(self._free) + len(idle)
        others = {k for k in self._resident if k.run != keys[0].run} if ready else set()
        try:
            self._bring(ready[:room], keep={*keep, *keys, *others})
        except ProtocolError:
            return

    def evict(self, keys: Iterable[Key]) -> None:
        """Free the members' slots; rows that changed go to host memory."""
        self._write_back([k for k in keys if self.page(k).slot is not None], leaving=())

    def row(self, key: Key) -> Row:
        """This rank's part of the member's newest row, in host memory; not to be written to."""
        page = self.page(key)
        self.bank.stream.arrive()
        if page.slot is not None:
            return self.bank.load(page.slot)
        if page.row is None:
            return self._starting([key])[key]
        self.bank.stream.settle()
        return page.row

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        """As `row`; what has to be read from the store is read together."""
        cold = self._starting([k for k in keys if self.page(k).slot is None and self.page(k).row is None])
        return [cold[k] if k in cold else self.row(k) for k in keys]

    def stepped(self, key: Key) -> None:
        """The member's row in its slot has changed."""
        page = self.page(key)
        page.unsaved = True
        self._host.forget(page)

    def saved(self, key: Key, state: ByteRange) -> None:
        """The member's newest row is in the store."""
        page = self.page(key)
        page.start.moved(key.member, state)
        page.unsaved = False

    def _bring(self, keys: Sequence[Key], *, keep: set[Key]) -> None:
        missing = [k for k in keys if self.page(k).slot is None]
        cold = self._starting([k for k in missing if self.page(k).row is None])
        self._write_back(self._victims(len(missing) - len(self._free), keep), leaving=missing)
        with self.bank.stream.copies():
            for key in missing:
                page = self.page(key)
                row = cold.get(key) or page.row
                assert row is not None
                page.slot = self._resident[key] = heapq.heappop(self._free)
                self.bank.store(page.slot, row, scale=page.scale)
                self._host.double(page)
        self.loaded += len(missing)

    def _victims(self, count: int, keep: set[Key]) -> list[Key]:
        if count <= 0:
            return []
        found = []
        for key in self._resident:
            if key not in keep:
                found.append(key)
                if len(found) == count:
                    break
        return found

    def _write_back(self, keys: Sequence[Key], *, leaving: Sequence[Key]) -> None:
        """Take members out of their slots, as many at a time as host memory holds; the rows of `leaving` are about to
        leave it."""
        most = max(1, self._host.capacity // (self._row_bytes + self._gradient_bytes))
        for first in range(0, len(keys), most):
            self._write_some(keys[first : first + most], leaving=leaving)

    def _write_some(self, keys: Sequence[Key], *, leaving: Sequence[Key]) -> None:
        numel, host = self.bank.numel, self._host
        pages = [self.page(k) for k in keys]
        changed = [p.unsaved and p.row is None for p in pages]
        held = [p.slot is not None and self.bank.has_gradient(p.slot) for p in pages]
        needed = sum(changed) * self._row_bytes + sum(held) * self._gradient_bytes
        host.make_room(needed, keep=pages, leaving=[self.page(k) for k in leaving])
        with self.bank.stream.copies():
            for key, page, is_changed, has_gradient in zip(keys, pages, changed, held, strict=True):
                assert page.slot is not None
                if is_changed:
                    page.row = self.bank.load(page.slot, into=host.new_row(numel))
                    host.put(Held(self, key, page, self._row_bytes))
                if has_gradient:
                    page.gradient = host.new_gradient(numel)
                    page.gradient.copy_(self.bank.gradient(page.slot), non_blocking=True)
                    host.put_gradient(self._gradient_bytes)
        for key, page in zip(keys, pages, strict=True):
            self._leave(key, page)
        self.written_back += sum(changed)
        self.clean += len(keys) - sum(changed)

    def _leave(self, key: Key, page: Page) -> None:
        slot = self._resident.pop(key)
        self.bank.release(slot)
        heapq.heappush(self._free, slot)
        page.slot = None
        self._host.single(page)

    def _lend(self, keys: Sequence[Key]) -> None:
        """Give members gradient rows, taking them from others if need be."""
        bank = self.bank
        wanted = [k for k in keys if not bank.has_gradient(self._resident[k])]
        short = len(wanted) - bank.gradients_free
        if short > 0:
            kept = set(keys)
            others = [k for k, slot in self._resident.items() if k not in kept and bank.has_gradient(slot)]
            self._write_back(others[:short], leaving=())
        with bank.stream.copies():
            for key in wanted:
                page = self.page(key)
                row = bank.gradient(self._resident[key])
                if page.gradient is not None:
                    row.copy_(page.gradient, non_blocking=True)
                    self._drop_gradient(page)

    def _drop_gradient(self, page: Page) -> None:
        if page.gradient is not None:
            page.gradient = None
            self._host.forget_gradient(self._gradient_bytes)

    def _starting(self, keys: Sequence[Key]) -> Mapping[Key, Row]:
        """This rank's part of the rows that members start with. Collective: all ranks get theirs, or none."""
        return agreed(self._ranks, lambda: self._started(keys)) if keys else {}

    def _started(self, keys: Sequence[Key]) -> Mapping[Key, Row]:
        found: dict[Key, Row] = {}
        by_start: dict[int, list[Key]] = {}
        for key in keys:
            read = self._ahead.pop(key, None)
            if read is not None and read[0].exception() is None:
                found[key] = read[0].result()[read[1]]
            else:
                by_start.setdefault(id(self.page(key).start), []).append(key)
        for some in by_start.values():
            found.update(zip(some, self._read(self.page(some[0]).start, [k.member for k in some]), strict=True))
        return found

    def _read(self, start: Start, members: Sequence[str]) -> list[Row]:
        take = self.bank.shard.take
        return [Row(take(r.weights), take(r.exp_avg), take(r.exp_avg_sq), step=r.step) for r in start.rows(members)]

    def _read_ahead(self, keys: Sequence[Key]) -> None:
        by_start: dict[int, list[Key]] = {}
        for key in keys:
            by_start.setdefault(id(self.page(key).start), []).append(key)
        for some in by_start.values():
            future = self._reader.submit(self._read, self.page(some[0]).start, [k.member for k in some])
            self._ahead.update({k: (future, i) for i, k in enumerate(some)})
