"""Collection of a population: what it must keep, the CronJob that runs it, and what came of the last pass.

What to keep is said here once, for the CronJob and for `allele gc`: the population's retention, and what its unfinished
runs may still read or resume from. A run that begins while a pass is at work is safe by the grace period alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from allele.api.population import AdapterPopulationSpec, Retention
from allele.api.run import RLRunSpec
from allele.api.store import AdapterStoreSpec
from allele.protocol.upkeep import CollectionReport
from allele_operator.planning import jobs, naming, observe, pods
from allele_operator.planning.admission import finished, lookup, missing
from allele_operator.planning.conditions import Found, Trouble, parse
from allele_operator.planning.model import Action, Apply, Delete, Obj, Ref, World
from allele_operator.planning.render.upkeep import collect_cron_job, collect_name

LEAST_LAG = 1
"""Policy lag that is allowed for even without a run, since one may begin at any time."""

_NO_RESULT = ("StoreMissing", "NotScheduled", "Scheduled")
"""Reasons of Collected that no pass gave."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What a pass keeps; the fields are those of `allele.store.retention.Policy`."""

    keep_last: int
    every: int
    grace_hours: int
    max_policy_lag: int
    runs: tuple[str, ...]
    """Uids of unfinished runs."""

    def arguments(self) -> list[str]:
        """For `python -m allele.store.jobs collect`."""
        numbers = {
            "--keep-last": self.keep_last,
            "--every": self.every,
            "--grace-hours": self.grace_hours,
            "--max-policy-lag": self.max_policy_lag,
        }
        flags = [word for flag, number in numbers.items() for word in (flag, str(number))]
        return flags + [word for run in self.runs for word in ("--run", run)]


def kept(retention: Retention, runs: Iterable[Obj], population: str) -> Kept:
    """`runs` are those of the namespace."""
    mine = [r for r in runs if r["spec"].get("populationRef") == population and not finished(r)]
    lags = [RLRunSpec.model_validate(r["spec"]).pace.max_policy_lag for r in mine]
    return Kept(
        keep_last=retention.keep_last,
        every=retention.every,
        grace_hours=retention.grace_hours,
        max_policy_lag=max([LEAST_LAG, *lags]),
        runs=tuple(sorted(r["metadata"]["uid"] for r in mine)),
    )


def plan(
    population: Obj, spec: AdapterPopulationSpec, runs: Sequence[Obj], world: World
) -> tuple[list[Action], list[Found]]:
    """What to do about the CronJob, and condition Collected where there is a schedule."""
    uid, name = population["metadata"]["uid"], population["metadata"]["name"]
    schedule = spec.retention.schedule
    there = [c for c in world.owned(uid, "CronJob") if not observe.deleting(c)]
    if schedule is None:
        return [Delete(Ref.of(c), c["metadata"]["uid"]) for c in there], []
    store = lookup(world, population, "AdapterStore", spec.store_ref)
    if store is None:
        trouble = missing("AdapterStore", spec.store_ref, population["metadata"]["namespace"], "StoreMissing")
        return [], [trouble.of("Collected")]
    wanted = collect_cron_job(
        population,
        AdapterStoreSpec.model_validate(store["spec"]),
        world.options,
        schedule=schedule,
        policy=kept(spec.retention, runs, name).arguments(),
    )
    cron = next((c for c in there if c["metadata"]["name"] == collect_name(population)), None)
    actions: list[Action] = [] if naming.as_applied(cron, wanted) else [Apply(wanted)]
    return actions, [_found(population, schedule, cron, world)]


def _found(population: Obj, schedule: str, cron: Obj | None, world: World) -> Found:
    known = _known(population)
    if cron is None:
        text = f'CronJob "{collect_name(population)}" with schedule {schedule!r} is not there yet'
        return known or Found("Collected", None, "NotScheduled", text)
    passes = [j for j in world.owned(cron["metadata"]["uid"], "Job") if not observe.deleting(j)]
    for job in passes:
        if not jobs.ended(job) and (trouble := pods.trouble(world.owned(job["metadata"]["uid"], "Pod"))):
            return trouble.of("Collected")
    over = [(end["lastTransitionTime"], job, end) for job in passes if (end := jobs.ended(job))]
    if over:
        _, job, end = max(over, key=lambda o: str(o[0]))
        return _result(job, end, world, known)
    return known or Found("Collected", None, "Scheduled", f"the first pass is due by {schedule!r}, UTC")


def _result(job: Obj, end: Obj, world: World, known: Found | None) -> Found:
    """Of a pass that ended. Its pods may be gone by now; then what is known stays."""
    at = f"at {parse(end['lastTransitionTime']):%Y-%m-%d %H:%M} UTC"
    try:
        report = CollectionReport.model_validate(jobs.report(job, world))
    except ValidationError:  # no pod is left, or none got that far
        if end["type"] == "Complete":
            return known or Found("Collected", True, "Collected", f"a pass went through {at}")
        trouble = pods.trouble(world.owned(job["metadata"]["uid"], "Pod"))
        if trouble is None and known and known.status is False:
            return known
        words = end.get("message") or f"Job {job['metadata']['name']} failed"
        trouble = trouble or Trouble("PassFailed", words)
        return Found("Collected", False, trouble.reason, f"{trouble.message} {at}", "Warning")
    text = f"{report.message} {at}"
    return Found("Collected", report.collected, report.reason, text, "Normal" if report.collected else "Warning")


def _known(population: Obj) -> Found | None:
    """What the last pass gave, as the status has it: Jobs and their pods go, their result stays."""
    old = observe.condition(population, "Collected")
    if not old or old["reason"] in _NO_RESULT:
        return None
    good = old["status"] == "True"
    return Found("Collected", good, old["reason"], old["message"], "Normal" if good else "Warning")
