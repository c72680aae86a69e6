"""Writer: one driver's right to commit for a run, and the protocol that takes it away from the driver before.

Delta's application transactions refuse a commit whose snapshot is older than another commit under the same ids, but
they do not refuse an old process that loads a fresh snapshot first. So a start raises `fence/<run>` by a commit of its
own, and every commit is: load the snapshot; FencedError if the fence there is higher than mine; done if `run/<run>`
has reached this step; else append under both ids. A raise of the fence between load and append is a conflict in
Delta, and the loop finds it at the next load. The same loop settles an unknown outcome (lost answer, retried request):
it reads again before it ever appends again, and an append that arrives late still carries the ids and conflicts.

The fence is looked at before the step, so that a driver which wakes up after its successor wrote the same step learns
that it was fenced, instead of taking the successor's commit for its own.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from allele.store import delta
from allele.store import facts as rows
from allele.store.catalogue import COMPACT_EVERY, SMALL_FILE, Catalogue
from allele.store.errors import FencedError, StoreError, StoreUnavailable
from allele.store.facts import Fact

log = logging.getLogger(__name__)

_ATTEMPTS: Final = 12
_MAX_WAIT: Final = 5.0
"""Seconds; attempts back off from 20 ms to this, with jitter: about half a minute in all."""

_PATIENCE: Final = 60.0
"""Seconds after which there is no further attempt; one may take long, as requests are retried within it."""

T = TypeVar("T")


class Writer:
    """Commits facts of one run. Made by `Catalogue.start`; not for use from two threads at once."""

    def __init__(self, catalogue: Catalogue, *, run: str, fence: int, last_step: int | None) -> None:
        self._catalogue = catalogue
        self.run: Final = run
        self.fence: Final = fence
        """Grows with every start; also the epoch of the run."""
        self.last_step: int | None = last_step
        """Newest step of the run that is committed, by whichever writer; None before the first."""

    @classmethod
    def start(cls, catalogue: Catalogue, run: str) -> Writer:
        """Raise the fence of `run` by one commit. A raise whose outcome is unknown is harmless: the next is higher."""
        if not run:
            raise ValueError("run: expected the uid of the run, found an empty string")
        return _insist(f"start of run {run}", lambda: cls._start(catalogue, run))

    @classmethod
    def _start(cls, catalogue: Catalogue, run: str) -> Writer:
        table = _snapshot(catalogue)
        delta.add_columns(table, rows.SCHEMA)  # before the look at the fence: it moves the snapshot
        fence = (table.transaction_version(f"fence/{run}") or 0) + 1
        last_step = table.transaction_version(f"run/{run}")
        delta.commit(table, [(f"fence/{run}", fence)])
        return cls(catalogue, run=run, fence=fence, last_step=last_step)

    def commit(self, step: int, facts: Iterable[Fact]) -> int:
        """Make facts of `step` visible, all or none; returns the version at which they are.

        Repeating a committed step changes nothing, whatever the facts. Raises FencedError, InvalidFact,
        InvalidRequest (a member's name), or StoreUnavailable, after which the outcome is unknown and the same call
        may be repeated.
        """
        rows_of_step = list(facts)
        rows.check(rows_of_step)
        what = f"run {self.run} step {step} is not known to be committed"
        version = _insist(what, lambda: self._commit(step, rows_of_step))
        return self._settle() if version is None else version

    def _commit(self, step: int, facts: Sequence[Fact]) -> int | None:
        """One attempt; the version at which the step was found to be committed already."""
        table = _snapshot(self._catalogue)
        self._check_fence(table)
        if self.last_step is not None and self.last_step >= step:
            return int(table.version())
        self._append(table, step=step, facts=facts)
        self.last_step = step
        return None

    def _check_fence(self, table: DeltaTable) -> None:
        newest = table.transaction_version(f"fence/{self.run}") or 0
        if newest > self.fence:
            raise FencedError(
                f"run {self.run}: expected fence {self.fence} to be the newest, found {newest}: a newer driver of this "
                "run has started, this one must stop"
            )
        self.last_step = table.transaction_version(f"run/{self.run}")

    def _append(self, table: DeltaTable, *, step: int, facts: Sequence[Fact]) -> None:
        time_ = _next_time(table)
        staged = None
        if facts:
            stamped = (self._stamped(f, step=step, time=time_) for f in facts)
            staged = delta.stage(self._catalogue.objects, rows.to_arrow(stamped))
            staged = dataclasses.replace(staged, modified=delta.milliseconds(time_))
        delta.commit(table, [(f"fence/{self.run}", self.fence), (f"run/{self.run}", step)], staged)

    def _stamped(self, fact: Fact, *, step: int, time: datetime) -> Fact:
        """A fact that is said again, as when its bytes have moved, stays that of the run and step that made it."""
        if fact.run:
            return dataclasses.replace(fact, time=time)
        return dataclasses.replace(
            fact, run=self.run, fence=self.fence, time=time, step=step if fact.step is None else fact.step
        )

    def _settle(self) -> int:
        """A version at which the commit is visible, after compaction when that is due.

        The commit is done; that its housekeeping failed is only worth a line.
        """
        table = _insist(f"version of {self._catalogue.objects.url()}", lambda: _snapshot(self._catalogue))
        if sum(f.size < SMALL_FILE for f in delta.live_files(table)) < COMPACT_EVERY:
            return int(table.version())
        try:
            return self._catalogue.compact()
        except StoreError:
            url = self._catalogue.objects.url()
            log.warning("compaction of %s failed, the next commit tries again", url, exc_info=True)
            return int(table.version())


def _snapshot(catalogue: Catalogue) -> DeltaTable:
    table = catalogue.snapshot(create=True)
    assert table is not None, "snapshot(create=True) returns a table or raises"
    return table


def _next_time(table: DeltaTable) -> datetime:
    """Now, or just past the newest commit if this machine's clock is behind the one that wrote it."""
    newest = max((f.modified for f in delta.live_files(table)), default=0)
    return max(rows.now(), datetime.fromtimestamp(newest / 1000, UTC) + timedelta(milliseconds=1))


def _insist(what: str, attempt: Callable[[], T]) -> T:
    """The answer of an attempt that does not fail. Raises StoreUnavailable when that took too many or too long."""
    begun = time.monotonic()
    failures = 0
    while True:
        try:
            return attempt()
        except (DeltaError, OSError, StoreUnavailable) as e:
            failures += 1
            seconds = time.monotonic() - begun
            if failures == _ATTEMPTS or seconds > _PATIENCE:
                raise StoreUnavailable(f"{what} after {failures} attempts in {seconds:.0f} s, repeat it: {e}") from e
            delay = random.uniform(0.5, 1.0) * min(_MAX_WAIT, 0.01 * 2**failures)
            log.info("%s: %s; looking again in %.2f s", what, e, delay)
            time.sleep(delay)
