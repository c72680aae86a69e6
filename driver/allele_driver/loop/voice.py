"""What a run says of itself while it goes: progress to whoever listens, and log lines."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from allele_driver.loop.exposer import Exposer
from allele_driver.loop.stages import Stages
from allele_driver.loop.tally import Phase, Tally
from allele_driver.loop.train import Trained
from allele_driver.metrics import REWARD, SKIPPED, STEP
from allele_driver.report import Reporter
from allele_driver.rollouts import Rollouts

log = logging.getLogger(__name__)


class Voice:
    """The tally of a run and where it is told."""

    def __init__(self, tally: Tally, reporter: Reporter) -> None:
        self.tally = tally
        self._reporter = reporter

    def phase(self, phase: Phase, message: str = "") -> None:
        self.tally.phase = phase
        self.tally.message = message
        self._reporter.report(self.tally.progress())

    def exposure(self, exposer: Exposer, *, failed: Mapping[str, str]) -> None:
        """What probes found, to be told with the next report; `failed`: member → why it stopped."""
        self.tally.max_gap = exposer.max_gap
        self.tally.probes = exposer.state
        self.tally.failed = dict(failed)

    def step(
        self,
        step: int,
        rollouts: Rollouts,
        trained: Mapping[str, Trained],
        *,
        stages: Stages,
        seconds: float,
    ) -> None:
        """After the commit of a step."""
        tally = self.tally
        skipped = sum(t.update.skipped for t in trained.values())
        SKIPPED.inc(skipped)
        tally.skipped += skipped
        tally.dropped += sum(n for reasons in rollouts.dropped.values() for n in reasons.values())
        tally.rewards = rollouts.mean_rewards()
        tally.stages = stages.finish()
        tally.durations.append(seconds)
        STEP.set(step)
        REWARD.set(tally.mean_reward or 0.0)
        self.phase("Training")
        log.info(
            "step",
            extra={
                "step": step,
                "reward": tally.mean_reward,
                "trained": len(trained),
                "seconds": round(seconds, 3),
                "stages": tally.stages,
                "loss": _mean([t.loss.loss for t in trained.values()]),
                "logprob_gap": max(
                    (g for t in trained.values() if (g := t.loss.logprob_gap) is not None), default=None
                ),
                "dropped": rollouts.dropped or None,
                "committed": tally.committed,
                "exposed": tally.exposed,
            },
        )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
