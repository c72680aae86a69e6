"""The bank: W, M, V, G buffers whose row i is the adapter in slot i, and one row outside of them.

Rows beyond `slots` exist only in W: exported bytes are read back into them and probed, no training slot is touched.
Row starts are aligned to 64 bytes, because GEMM kernels may give other bits for other alignments and a member's
result must not depend on its slot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from allele.format import AdapterShape
from allele.protocol.commands import OptimizerSpec
from allele_trainer.bank.layout import Block, blocks
from allele_trainer.bank.shard import Shard

_ALIGN = 16
"""fp32 elements in 64 bytes."""


@dataclasses.dataclass
class Row:
    """One adapter outside of the bank, in host memory; `gradient` only when it was evicted before its step."""

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0
    gradient: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Stack:
    """Strided views of all rows for one linear: A `[rows, k·r, in]`, each B `[rows, out, r]`, and their gradients."""

    block: Block
    a: Tensor
    a_grad: Tensor
    b: tuple[Tensor, ...]
    b_grad: tuple[Tensor, ...]


class Bank:
    """Rows of one AdapterShape; fixed size, never per-tensor work except for the views made here once."""

    def __init__(self, shape: AdapterShape, *, slots: int, probes: int, device: torch.device) -> None:
        self.shape, self.slots, self.probes, self.device = shape, slots, probes, device
        stride = math.ceil(shape.numel / _ALIGN) * _ALIGN
        self._weights = torch.zeros(slots + probes, stride, device=device)
        self._exp_avg, self._exp_avg_sq, self._gradient = (torch.zeros(slots, stride, device=device) for _ in range(3))
        self.scale = torch.zeros(slots + probes, device=device)
        self.steps = [0] * slots
        self.stacks = {site: self._stack(block) for site, block in blocks(Shard(shape)).items()}

    def _stack(self, block: Block) -> Stack:
        def views(buffer: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            a_rows = len(block.targets) * block.rank
            a = buffer[:, block.a_offset : block.a_offset + a_rows * block.inputs].unflatten(1, (a_rows, block.inputs))
            b = tuple(
                buffer[:, at : at + out * block.rank].unflatten(1, (out, block.rank))
                for at, out in zip(block.b_offsets, block.outputs, strict=True)
            )
            return a, b

        a, b = views(self._weights)
        a_grad, b_grad = views(self._gradient)
        return Stack(block, a, a_grad, b, b_grad)

    def weights(self, slot: int) -> Tensor:
        """`[P]`, a view."""
        return self._weights[slot, : self.shape.numel]

    def gradient(self, slot: int) -> Tensor:
        """`[P]`, a view."""
        return self._gradient[slot, : self.shape.numel]

    def spoil(self, slot: int) -> None:
        """Make the gradient not finite, so that the slot's next step is skipped."""
        self._gradient[slot, 0] = torch.nan

    def store(self, slot: int, row: Row, *, scale: float) -> None:
        """Host → slot."""
        size = self.shape.numel
        self._weights[slot, :size].copy_(row.weights)
        self._exp_avg[slot, :size].copy_(row.exp_avg)
        self._exp_avg_sq[slot, :size].copy_(row.exp_avg_sq)
        if row.gradient is None:
            self._gradient[slot].zero_()
        else:
            self._gradient[slot, :size].copy_(row.gradient)
        self.steps[slot] = row.step
        self.scale[slot] = scale

    def load(self, slot: int, *, with_gradient: bool = False) -> Row:
        """Slot → host, a copy."""
        size = self.shape.numel

        def copy(buffer: Tensor) -> Tensor:
            return buffer[slot, :size].to("cpu", copy=True)

        return Row(
            weights=copy(self._weights),
            exp_avg=copy(self._exp_avg),
            exp_avg_sq=copy(self._exp_avg_sq),
            step=self.steps[slot],
            gradient=copy(self._gradient) if with_gradient else None,
        )

    def store_probe(self, index: int, weights: Tensor, *, scale: float) -> int:
        """Put weights `[P]` in a scratch row; gives its slot."""
        slot = self.slots + index
        self._weights[slot, : self.shape.numel].copy_(weights)
        self.scale[slot] = scale
        return slot

    def step(self, updates: Sequence[Update]) -> list[Stepped]:
        """AdamW on the rows named, each with its own rate, clip and step count; their gradients are zero afterwards.

        A row whose gradient norm is not finite keeps its weights, moments and step.
        """
        if not updates:
            return []
        norms = torch.stack(torch._foreach_norm([self.gradient(u.slot) for u in updates])).cpu().tolist()
        stepped = [self._step(u, norm) for u, norm in zip(updates, norms, strict=True)]
        for update in updates:
            self._gradient[update.slot].zero_()
        return stepped

    def _step(self, update: Update, norm: float) -> Stepped:
        slot, size, rule = update.slot, self.shape.numel, update.optimizer
        if not math.isfinite(norm):
            return Stepped(step=self.steps[slot], norm=norm, skipped=True)
        self.steps[slot] += 1
        # torch's fused kernel divides the gradient by grad_scale: clip_grad_norm_ costs no pass of its own.
        torch._fused_adamw_(
            [self.weights(slot)],
            [self.gradient(slot)],
            [self._exp_avg[slot, :size]],
            [self._exp_avg_sq[slot, :size]],
            [],
            [torch.tensor(float(self.steps[slot]), device=self.device)],
            lr=update.learning_rate,
            beta1=rule.beta1,
            beta2=rule.beta2,
            weight_decay=rule.weight_decay,
            eps=rule.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=torch.tensor(max(1.0, (norm + 1e-6) / rule.clip), device=self.device),
            found_inf=None,
        )
        return Stepped(step=self.steps[slot], norm=norm, skipped=False)


@dataclasses.dataclass(frozen=True)
class Update:
    slot: int
    learning_rate: float
    optimizer: OptimizerSpec


@dataclasses.dataclass(frozen=True)
class Stepped:
    step: int
    norm: float
    skipped: bool
