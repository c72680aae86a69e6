"""Held-out rewards at the start and the end of a run, and the facts that carry them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from allele.store import Fact, Index
from allele_driver.loop.rollout import Draw, Roller
from allele_driver.loop.roster import Roster
from allele_driver.loop.stages import Stages

HELDOUT = "heldout_reward"
"""Key in the metrics of facts."""


async def evaluate(
    roster: Roster, roller: Roller, *, prompts: int, current: Mapping[str, int], skip: Collection[str], version: int
) -> dict[str, float]:
    """Mean reward of each member on held-out prompts, one sample each at the run's temperature; none for 0 prompts."""
    if prompts == 0:
        return {}
    rollouts = await roster.roll_out(
        roller,
        [m for m in roster.members if m.name not in skip],
        draw=lambda _: Draw(prompts=prompts, samples=1, held_out=True, salt="held-out"),
        revisions=current,
        version=version,
        stages=Stages(),
    )
    return rollouts.mean_rewards()


def restated(
    heldout: Mapping[str, float], *, but: Collection[str], current: Mapping[str, int], index: Index
) -> list[Fact]:
    """Exposed facts said again with held-out rewards, for members whose served revision is the evaluated one."""
    facts = []
    for member, reward in heldout.items():
        served = index.exposed(member)
        if member in but or served is None or served.revision != current.get(member):
            continue
        if index.hold(member) is None:
            facts.append(Fact(kind="Exposed", member=member, revision=served.revision, metrics={HELDOUT: reward}))
    return facts


def metrics_of(member: str, heldout: Mapping[str, float]) -> dict[str, float]:
    """Of a fact of this member."""
    return {HELDOUT: heldout[member]} if member in heldout else {}


def before(roster: Roster, index: Index, *, run: str) -> dict[str, float]:
    """Held-out rewards of step 0, which an earlier driver of the run may have found."""
    first = (index.get(m.name, 1) for m in roster.members)
    return {f.member: f.metrics[HELDOUT] for f in first if f is not None and f.run == run and HELDOUT in f.metrics}


def mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def summary(before: Mapping[str, float], after: Mapping[str, float], *, shown: int = 64) -> dict[str, object]:
    """What the driver's last log line says."""
    return {
        "before": mean(before),
        "after": mean(after),
        "worst": min(after.values(), default=None),
        "best": max(after.values(), default=None),
        "members": {m: round(after[m], 4) for m in list(after)[:shown]},
    }
