"""Progress of a run, pushed by its driver: `POST /v1/progress` of the operator, or of `allele run` in local mode."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from allele.protocol.wire import Wire


class Reward(Wire):
    mean: float
    best: float
    worst: float


class TrainerSlots(Wire):
    """What the trainer said of itself when the run reset it."""

    slots: int
    wave: int
    reason: str = Field("", max_length=512)


class Probes(Wire):
    """What the newest probe of each member found."""

    reason: Literal["ProbesPassed", "Gap", "NotMoved", "LoadFailed"]
    """The gravest refusal, if any."""
    failing: int = 0
    """Members that are served by an older revision because their newest probe failed."""
    message: str = Field("", max_length=1024)


class Progress(Wire):
    """The whole state, not a difference: losing one report loses nothing."""

    namespace: str
    run: str
    uid: str
    epoch: int
    phase: Literal["Starting", "Training", "Finishing", "Succeeded", "Failed"]
    step: int
    steps: int
    eta_seconds: int | None = None
    reward: Reward | None = None
    policy_lag: int = 0
    members: int = 0
    trained: int = 0
    committed: int = 0
    """Revisions committed by this run."""
    exposed: int = 0
    failed_members: dict[str, str] = Field(default_factory=dict, max_length=16)
    """Member → reason, the first few; the catalogue has all."""
    dropped_samples: int = 0
    skipped_steps: int = 0
    exposure_max_gap: float | None = None
    probes: Probes | None = None
    """None before the first verdict."""
    message: str = Field("", max_length=1024)
    trainer: TrainerSlots | None = None
    stages: dict[str, float] = Field(default_factory=dict, max_length=16)
    """Seconds of the last step by stage (generate, score, train, export, commit, probe)."""
