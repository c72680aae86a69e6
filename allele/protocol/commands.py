"""Commands of a driver to a trainer: `POST /v1/<command>`.

Commands are idempotent within (run, epoch, incarnation): the trainer keeps the answer of the last `seq` and repeats
it; the next expected one is last + 1, anything else is a SequenceGap. `reset` opens an epoch (seq 0): all rows of the
run are forgotten and come back from the store when admitted. A new incarnation (trainer restart) or epoch (driver
restart) replays the whole step; nothing in memory is trusted across either.

`forward_backward` carries samples and so travels as Arrow (`allele.protocol.samples`); everything else is JSON.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from allele.protocol.initialisation import MAX_RANK, InitSpec, Scaling, scale_of, stored_rank
from allele.protocol.losses import LossSpec, MemberLoss
from allele.protocol.wire import Wire


class ByteRange(Wire):
    """Bytes of an object in the population's store, with their sha256 (hex): one ranged GET."""

    path: str
    offset: int = Field(ge=0)
    length: int = Field(gt=0)
    digest: str


class AdapterSpec(Wire):
    """What an adapter is apart from its numbers."""

    rank: int
    """Of the part that trains."""
    alpha: float
    targets: tuple[str, ...]
    """Names of PEFT target modules, e.g. q_proj."""
    scaling: Scaling = "Standard"
    init: InitSpec = InitSpec()

    @property
    def scale(self) -> float:
        """Factor on B·A·x."""
        return scale_of(alpha=self.alpha, rank=self.rank, scaling=self.scaling)

    @property
    def stored_rank(self) -> int:
        """Of its matrices: what a trainer and an engine must have room for."""
        return stored_rank(self.rank, self.init.base_mode)

    @model_validator(mode="after")
    def _fits(self) -> AdapterSpec:
        if self.stored_rank > MAX_RANK:
            raise ValueError(f"rank: expected at most {MAX_RANK // 2} with baseMode Rank2r, found {self.rank}")
        return self


class OptimizerSpec(Wire):
    """AdamW (arXiv:1711.05101), clipped by each member's own gradient norm; the learning rate comes with each step."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0


class MemberStart(Wire):
    """Where a member starts: `state` resumes exactly; `weights` alone: a fresh optimizer; neither: init by seed."""

    member: str
    adapter: AdapterSpec
    optimizer: OptimizerSpec
    seed: int
    state: ByteRange | None = None
    weights: ByteRange | None = None


class Header(Wire):
    run: str
    epoch: int
    incarnation: str
    seq: int


class Reset(Wire):
    run: str
    epoch: int
    namespace: str
    population: str
    members: tuple[MemberStart, ...]


class TrainerSetting(Wire):
    """What computes: recorded with every revision."""

    layout: dict[str, int]
    """Degrees of parallelism tp, pp, ep, dp; sequence_parallel and recompute are 0 or 1."""
    device: str
    dtype: str
    """Of the resident base."""
    torch: str
    megatron_core: str
    image: str = ""
    """That the pod runs; empty outside of one."""


class ResetDone(Wire):
    incarnation: str
    slots: int
    wave: int
    """Members to admit and train at a time; with fewer than `slots`, the next wave has room to come in meanwhile."""
    slots_reason: str
    base_digest: str
    setting: TrainerSetting


class Admit(Wire):
    """Make rows of these members resident (at most `wave`); others of the run may lose their slots."""

    header: Header
    members: tuple[str, ...]
    next: tuple[str, ...] = ()
    """Members of the wave after this one: their rows are brought in while this one computes."""


class Admitted(Wire):
    slots: dict[str, int]


class ForwardBackward(Wire):
    """Header of the Arrow batch `allele.protocol.samples.TRAIN`; gradients add up until optim_step."""

    header: Header
    losses: tuple[LossSpec, ...]
    """Each row of the batch names one by its place; all rows of a member the same one."""


Mode = Literal["Batched", "OneByOne"]
"""Micro-batches of many members or of one member each: the trainer chooses by measured cost; the same bits on CPU."""


class ForwardBackwardDone(Wire):
    members: dict[str, MemberLoss]
    seconds: float
    """From its first micro-batch to its last, those of other runs in between included."""
    mode: Mode


class OptimStep(Wire):
    header: Header
    learning_rates: dict[str, float]


class MemberUpdate(Wire):
    step: int
    """Optimizer steps applied to this member so far."""
    grad_norm: float
    skipped: bool
    """True when the gradient was not finite: the row is unchanged."""


class OptimStepDone(Wire):
    members: dict[str, MemberUpdate]


class ProbeSequence(Wire):
    prompt: tuple[int, ...]
    completion: tuple[int, ...]


class Export(Wire):
    """Write packed adapters as one segment; `probes` are scored under the exported bytes."""

    header: Header
    members: tuple[str, ...]
    probes: tuple[ProbeSequence, ...] = ()


class ExportDone(Wire):
    weights: dict[str, ByteRange]
    shape_digests: dict[str, str]
    factor_digests: dict[str, str] = Field(default_factory=dict)
    """Of the factors of the base that the member started from (`Residual.factors`); without any it is not here."""
    probe_logprobs: dict[str, tuple[float, ...]]
    """Per member, completion tokens of all probe sequences one after the other."""


class SaveState(Wire):
    header: Header
    members: tuple[str, ...]


class SaveStateDone(Wire):
    states: dict[str, ByteRange]


class Evict(Wire):
    header: Header
    members: tuple[str, ...]


class Evicted(Wire):
    members: tuple[str, ...]


class TrainerInfo(Wire):
    """`GET /v1/info`."""

    incarnation: str
    base_digest: str
    slots: int
    """Of each adapter shape."""
    wave: int
    slots_reason: str
    """Where `slots` and `wave` come from: given, or what a probe of the memory found."""
    used: int
    runs: dict[str, int]
    """Epoch of each run."""
    setting: TrainerSetting
