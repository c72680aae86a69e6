"""Seconds of a step by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from allele_driver.metrics import STAGE_SECONDS


class Stages:
    """`with stages("train"):` adds to that stage's seconds; stages that overlap each count in full."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = self._clock()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._clock() - begun

    def finish(self) -> dict[str, float]:
        """Rounded, and observed in the metrics."""
        for stage, seconds in self.seconds.items():
            STAGE_SECONDS.labels(stage).observe(seconds)
        return {stage: round(seconds, 4) for stage, seconds in self.seconds.items()}
