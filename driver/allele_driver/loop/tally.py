"""Counts of a run across restarts of its driver, and the progress made of them."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Literal

from allele.protocol.bundle import RunBundle
from allele.protocol.progress import Probes, Progress, Reward, TrainerSlots
from allele.store import Fact

Phase = Literal["Starting", "Training", "Finishing", "Succeeded", "Failed"]
FAILED_SHOWN = 16
RECENT = 10
"""Steps whose mean duration estimates the rest."""


@dataclasses.dataclass
class Tally:
    """Committed and exposed follow from the catalogue; the rest counts since the driver started."""

    bundle: RunBundle
    epoch: int = 0
    members: int = 0
    step: int = 0
    revisions: set[tuple[str, int | None]] = dataclasses.field(default_factory=set)
    """Committed ones: a collection says some again, with another place."""
    exposed: int = 0
    trained: set[str] = dataclasses.field(default_factory=set)
    dropped: int = 0
    skipped: int = 0
    policy_lag: int = 0
    rewards: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    max_gap: float | None = None
    probes: Probes | None = None
    trainer: TrainerSlots | None = None
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    durations: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=RECENT))
    phase: Phase = "Starting"
    message: str = ""

    def count(self, facts: Iterable[Fact]) -> None:
        """Take in committed facts; those of other runs do not count."""
        for fact in facts:
            if fact.run != self.bundle.run_uid:
                continue
            if fact.kind == "Committed":
                self.revisions.add((fact.member, fact.revision))
                if fact.step:
                    self.trained.add(fact.member)
            elif fact.kind == "Exposed":
                self.exposed += 1

    @property
    def committed(self) -> int:
        return len(self.revisions)

    @property
    def mean_reward(self) -> float | None:
        return sum(self.rewards.values()) / len(self.rewards) if self.rewards else None

    def progress(self) -> Progress:
        steps = self.bundle.run_spec.stop.steps
        mean = self.mean_reward
        eta = None
        if self.durations and self.phase == "Training":
            eta = round((steps - self.step) * sum(self.durations) / len(self.durations))
        return Progress(
            namespace=self.bundle.namespace,
            run=self.bundle.run,
            uid=self.bundle.run_uid,
            epoch=self.epoch,
            phase=self.phase,
            step=min(self.step, steps),
            steps=steps,
            eta_seconds=eta,
            reward=None
            if mean is None
            else Reward(mean=mean, best=max(self.rewards.values()), worst=min(self.rewards.values())),
            policy_lag=self.policy_lag,
            members=self.members,
            trained=len(self.trained),
            committed=self.committed,
            exposed=self.exposed,
            failed_members={m: why[:500] for m, why in list(self.failed.items())[:FAILED_SHOWN]},
            dropped_samples=self.dropped,
            skipped_steps=self.skipped,
            exposure_max_gap=self.max_gap,
            probes=self.probes,
            message=self.message[:1024],
            trainer=self.trainer,
            stages=dict(list(self.stages.items())[:16]),
        )
