"""One packed micro-batch on the device: what the layers need beside hidden states `[T, 1, h]`.

It is a PackedSeqParams, because that is the one argument which Megatron hands unchanged to every layer, also when it
recomputes one. `qkv_format` stays unset: the local attention of Megatron refuses its own packed format.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from allele_trainer.bank.banks import Banks
from allele_trainer.lora.plan import Plan
from allele_trainer.rl.packing import Packed


@dataclasses.dataclass
class Bucket:
    """Sequences that attention runs together: `gather` `[n·width]` indexes tokens (T = a zero row)."""

    width: int
    gather: Tensor


@dataclasses.dataclass(frozen=True)
class Carried:
    """Whose adapter each token has, in numbers that mean the same on every rank to which experts' tokens are sent.

    `owners` `[T]`: of the token's adapter, among `banks`; −1 without one.
    """

    banks: Banks
    owners: Tensor
    gradients: bool


@dataclasses.dataclass
class PackedBatch(PackedSeqParams):
    tokens: Tensor = None  # type: ignore[assignment]
    """`[T]` ids, padding included."""
    positions: Tensor = None  # type: ignore[assignment]
    """`[T]` position of each token in its sequence."""
    longest: int = 0
    rotary: tuple[Tensor, Tensor] = None  # type: ignore[assignment]
    """Cosines and sines `[T, 1, 1, head_dim / 2]` of the positions; set by the model."""
    buckets: tuple[Bucket, ...] = ()
    scatter: Tensor = None  # type: ignore[assignment]
    """`[T]` row of each token in the concatenated bucket outputs; the row behind the last is zero."""
    rows: Tensor = None  # type: ignore[assignment]
    """`[R]` tokens whose next-token logits are wanted."""
    targets: Tensor = None  # type: ignore[assignment]
    """`[n]` ids whose logprobs are wanted, n ≤ R: those of the first rows; the rest of the rows is padding."""
    plan: Plan | None = None
    carried: Carried | None = None
    """For experts; None runs them without adapters."""
    routing: Tensor | None = None
    """`[layers, T, k]` experts that the rollout chose, −1 where it is not known and the router chooses."""


_running: contextvars.ContextVar[PackedBatch | None] = contextvars.ContextVar("allele_batch", default=None)


@contextlib.contextmanager
def running(batch: PackedBatch) -> Iterator[None]:
    token = _running.set(batch)
    try:
        yield
    finally:
        _running.reset(token)


def current_batch() -> PackedBatch:
    """The micro-batch of the layer being run."""
    batch = _running.get()
    assert batch is not None, "a layer was run outside of PackedLayer"
    return batch


def to_device(
    packed: Packed, *, plan: Plan | None, device: torch.device, carried: Carried | None = None
) -> PackedBatch:
    def tensor(array: object) -> Tensor:
        return torch.as_tensor(array).to(device)

    return PackedBatch(
        tokens=tensor(packed.tokens),
        positions=tensor(packed.positions),
        longest=packed.longest,
        buckets=tuple(Bucket(b.width, tensor(b.gather)) for b in packed.buckets),
        scatter=tensor(packed.scatter),
        rows=tensor(packed.rows),
        targets=tensor(packed.targets),
        plan=plan,
        carried=carried,
        routing=None if packed.routing is None else tensor(packed.routing).long(),
    )
