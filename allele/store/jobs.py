"""What Jobs run on the folder of a population: erase it once, or one pass of collection.

    python -m allele.store.jobs erase --store URL --namespace N --population P --uid U [--termination-log PATH]
    python -m allele.store.jobs collect … --keep-last 5 --grace-hours 24 [--run UID …]

Progress goes to standard error, the report to standard output and the termination log as JSON. Exit code 1: try again.
Nothing is written into a folder whose record names another uid: the same place may be a population of another cluster.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from allele.protocol.errors import ProtocolError
from allele.protocol.upkeep import MESSAGE_LIMIT, CollectionReport, ErasureReport
from allele.store.collect import Collected, collect
from allele.store.erase import erase
from allele.store.errors import StoreError
from allele.store.facts import now
from allele.store.population import PopulationStore
from allele.store.retention import Policy

_TELL_SECONDS = 5.0
Report = ErasureReport | CollectionReport


class Told:
    """Progress as lines of a log: each new activity at once, then one every few seconds, and its end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what = ""
        self._next = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what or done == total or self._clock() >= self._next:
            self._what, self._next = what, self._clock() + _TELL_SECONDS
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


def erased(store: PopulationStore, *, uid: str) -> ErasureReport:
    """Never raises for what a store does."""
    where = store.objects.url()
    try:
        done = erase(store, uid=uid, progress=Told())
    except (StoreError, ProtocolError) as e:
        return ErasureReport(erased=False, reason=type(e).__name__, message=str(e)[:MESSAGE_LIMIT])
    message = {
        "Erased": f"{where}: deleted {_amount(done.objects, done.size)}",
        "NothingThere": f"{where}: nothing was there",
        "OwnedByAnother": f"{where}: belongs to the population with uid {done.owner} by now; nothing was deleted",
    }[done.outcome]
    return ErasureReport(erased=True, reason=done.outcome, message=message, objects=done.objects, size=done.size)


def collected(store: PopulationStore, *, uid: str, policy: Policy) -> CollectionReport:
    """Never raises for what a store does."""
    where = store.objects.url()
    try:
        record = store.record()
        if record is None:
            return CollectionReport(collected=True, reason="Collected", message="no run has written yet")
        if record.uid != uid or record.erasing:
            text = f"{where}: expected the folder of population {uid}, found that of {record.uid}"
            text += ", which is being erased" if record.erasing else ""
            return CollectionReport(collected=False, reason="OwnedByAnother", message=text)
        return _summary(collect(store, policy=policy, now=now(), progress=Told()))
    except (StoreError, ProtocolError) as e:
        return CollectionReport(collected=False, reason=type(e).__name__, message=str(e)[:MESSAGE_LIMIT])


def _summary(done: Collected) -> CollectionReport:
    plan = done.plan
    size = sum(o.size for o in plan.delete)
    counts = [
        f"retired {len(plan.retire)} revisions" if plan.retire else "",
        f"dropped {len(plan.drop)} states" if plan.drop else "",
        f"compacted {len(plan.compact) - len(done.damaged)} objects" if plan.compact else "",
        f"deleted {_amount(len(plan.delete), size)}" if plan.delete else "",
    ]
    message = ", ".join(c for c in counts if c) or "nothing was to be done"
    if done.damaged:
        message = f"{message}; damaged and not moved: {len(done.damaged)}, the first: {done.damaged[0]}"
    return CollectionReport(
        collected=not done.damaged,
        reason="Damaged" if done.damaged else "Collected",
        message=message[:MESSAGE_LIMIT],
        retired=len(plan.retire),
        dropped=len(plan.drop),
        compacted=len(plan.compact) - len(done.damaged),
        deleted=len(plan.delete),
        size=size,
        damaged=len(done.damaged),
    )


def _amount(objects: int, size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{objects} objects ({value:.3g} {unit})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allele.store.jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _place(commands.add_parser("erase", description="Delete all of it."))
    collect = _place(commands.add_parser("collect", description="Delete what retention does not keep."))
    usual = Policy()
    hours = usual.grace / timedelta(hours=1)
    collect.add_argument("--keep-last", type=int, default=usual.keep_last, help="newest revisions of each member")
    collect.add_argument("--every", type=int, default=usual.every, help="also every n-th revision; 0: none")
    collect.add_argument("--max-policy-lag", type=int, default=usual.max_policy_lag, help="largest of unfinished runs")
    collect.add_argument("--grace-hours", type=float, default=hours, help="bytes stay so long when no longer needed")
    collect.add_argument("--run", action="append", default=[], help="uid of an unfinished run; repeatable")
    return parser


def _place(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--store", required=True, help="s3://, gs://, az:// or file:///")
    command.add_argument("--namespace", required=True, help="first folder")
    command.add_argument("--population", required=True, help="folder in it")
    command.add_argument("--uid", required=True, help="of the AdapterPopulation; the record must name it")
    command.add_argument("--termination-log", type=Path, help="also write the report here, as a pod's last message")
    return command


def _run(arguments: argparse.Namespace) -> tuple[Report, bool]:
    """The report, and whether trying again would help."""
    store = PopulationStore.open(arguments.store, namespace=arguments.namespace, population=arguments.population)
    if arguments.command == "erase":
        erasure = erased(store, uid=arguments.uid)
        return erasure, not erasure.erased
    policy = Policy(
        keep_last=arguments.keep_last,
        every=arguments.every,
        max_policy_lag=arguments.max_policy_lag,
        grace=timedelta(hours=arguments.grace_hours),
        runs=frozenset(arguments.run),
    )
    collection = collected(store, uid=arguments.uid, policy=policy)
    return collection, not collection.collected and collection.reason not in ("Damaged", "OwnedByAnother")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    report, failed = _run(arguments)
    text = report.model_dump_json()
    print(text)
    if arguments.termination_log is not None:
        arguments.termination_log.write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
