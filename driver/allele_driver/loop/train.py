"""One optimizer step of some members: waves over the trainer's slots, and their bytes in the store.

After `train` the revisions lie in segments but do not exist yet: the commit makes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from allele.protocol.commands import (
    ByteRange,
    ExportDone,
    MemberUpdate,
    Mode,
    ProbeSequence,
)
from allele.protocol.losses import LossSpec, MemberLoss
from allele_driver.cohorts import waves
from allele_driver.loop.stages import Stages
from allele_driver.rollouts import TrainRow
from allele_driver.trainer import Trainer

K = TypeVar("K")


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one member trains on in this step."""

    member: str
    part: int
    loss: LossSpec
    rows: tuple[TrainRow, ...]
    own_step: int
    """Optimizer steps of this run that the member has had, this one included."""
    learning_rate: float
    saves_state: bool


@dataclasses.dataclass(frozen=True)
class Exported:
    """Bytes of one member in the store."""

    weights: ByteRange
    shape: str
    probe: tuple[float, ...]
    state: ByteRange | None
    factors: str = ""
    """Digest of the factors of the base that it started from."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """`exported` is None when the gradient was not finite: the member is unchanged."""

    mode: Mode
    loss: MemberLoss
    update: MemberUpdate
    exported: Exported | None


async def train(
    trainer: Trainer,
    turns: Sequence[Turn],
    *,
    wave: int,
    probes: Mapping[int, Sequence[ProbeSequence]],
    ending: Callable[[], bool],
    stages: Stages,
) -> dict[str, Trained]:
    """`wave`: members at a time; `probes` by part; when the run is `ending`, every member saves its state.

    Raises UnknownIncarnation when the trainer restarted: nothing of it counts then.
    """
    trained: dict[str, Trained] = {}
    for some, following in waves(turns, size=wave):
        with stages("train"):
            await trainer.admit([t.member for t in some], following=[t.member for t in following])
            done = await trainer.forward_backward([(t.loss, t.rows) for t in some])
            updates = (await trainer.optim_step({t.member: t.learning_rate for t in some})).members
        changed = [t for t in some if not updates[t.member].skipped]
        exported = await export(
            trainer,
            {part: [t.member for t in mine] for part, mine in _by(changed, [t.part for t in changed]).items()},
            probes=probes,
            saves=[t.member for t in changed if t.saves_state or ending()],
            stages=stages,
        )
        for t in some:
            trained[t.member] = Trained(done.mode, done.members[t.member], updates[t.member], exported.get(t.member))
    return trained


async def initialise(
    trainer: Trainer, members: Sequence[str], *, wave: int, probes: Sequence[ProbeSequence], stages: Stages
) -> dict[str, Exported]:
    """Write members of one part as they begin, with their state."""
    found: dict[str, Exported] = {}
    for some, following in waves(members, size=wave):
        await trainer.admit(some, following=following)
        found |= await export(trainer, {0: some}, probes={0: probes}, saves=some, stages=stages)
    return found


async def export(
    trainer: Trainer,
    members: Mapping[int, Sequence[str]],
    *,
    probes: Mapping[int, Sequence[ProbeSequence]],
    saves: Sequence[str],
    stages: Stages,
) -> dict[str, Exported]:
    """Write members, by part, and the optimizer states of `saves` to the store."""
    found: dict[str, ExportDone] = {}
    with stages("export"):
        for part, some in members.items():
            done = await trainer.export(some, probes.get(part, ()))
            found |= dict.fromkeys(some, done)
    states: dict[str, ByteRange] = {}
    if saves:
        with stages("save"):
            states = (await trainer.save_state(saves)).states
    return {
        m: Exported(
            weights=done.weights[m],
            shape=done.shape_digests[m],
            probe=tuple(done.probe_logprobs.get(m, ())),
            state=states.get(m),
            factors=done.factor_digests.get(m, ""),
        )
        for m, done in found.items()
    }


def _by(turns: Sequence[Turn], keys: Sequence[K]) -> dict[K, list[Turn]]:
    found: dict[K, list[Turn]] = {}
    for turn, key in zip(turns, keys, strict=True):
        found.setdefault(key, []).append(turn)
    return found
