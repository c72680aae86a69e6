"""Megatron linears with adapters: base output plus each token's own B·A·x.

A and B are applied by separate operations with the `[T, k·r]` product between them: that is where a tensor-parallel
layout puts its collective, so that it carries rank-sized and not hidden-sized activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from allele_trainer.bank.layout import GROUPS
from allele_trainer.bank.rows import Stack
from allele_trainer.lora.grouped import grouped_linear
from allele_trainer.lora.plan import Plan, current

Assemble = Callable[[list[Tensor]], Tensor]
"""Outputs `[T, out_j]` of a group's targets → `[T, out]` in the order of the Megatron linear."""


@dataclasses.dataclass(frozen=True)
class Crossing:
    """What the `[T, k·r]` product of A goes through on its way to B, on a linear that tensor ranks share."""

    through: Callable[[Tensor], Tensor]
    local_a: bool = False
    """A sees only the tokens of this rank's part of the sequence, or B does."""
    local_b: bool = False


def crossing(*, by_inputs: bool, tp: int, sequence_parallel: bool) -> Crossing:
    """Of a linear split by outputs (B's rows; A whole), or by inputs (A's columns; B whole)."""
    if tp == 1:
        return Crossing(lambda h: h)
    if by_inputs:
        if sequence_parallel:
            return Crossing(reduce_scatter_to_sequence_parallel_region, local_b=True)
        return Crossing(reduce_from_tensor_model_parallel_region)
    if sequence_parallel:
        return Crossing(gather_from_sequence_parallel_region, local_a=True)
    return Crossing(copy_to_tensor_model_parallel_region)


class AdaptedLinear(nn.Module):
    """Wraps one linear of one layer; which bank and which slots come with the current plan."""

    def __init__(
        self,
        inner: nn.Module,
        *,
        site: tuple[int, str],
        outputs: tuple[int, ...],
        assemble: Assemble,
        crossing: Crossing,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.site, self._outputs, self._assemble, self._crossing = site, outputs, assemble, crossing

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        y, bias = self.inner(x, *args, **kwargs)
        plan = current()
        stack = plan.bank.stacks.get(self.site) if plan is not None else None
        if plan is None or stack is None:
            return y, bias
        delta = self._delta(x.reshape(-1, x.shape[-1]), stack=stack, plan=plan)
        return y + delta.view_as(y), bias

    def _delta(self, x: Tensor, *, stack: Stack, plan: Plan) -> Tensor:
        return low_rank(
            x,
            stack=stack,
            before=plan.local if self._crossing.local_a else plan,
            after=plan.local if self._crossing.local_b else plan,
            through=self._crossing.through,
            outputs=dict(zip(GROUPS[self.site[1]], self._outputs, strict=True)),
            assemble=self._assemble,
        )


def low_rank(
    x: Tensor,
    *,
    stack: Stack,
    before: Plan | None,
    after: Plan | None,
    outputs: Mapping[str, int],
    assemble: Assemble,
    through: Callable[[Tensor], Tensor] = lambda h: h,
) -> Tensor:
    """`[T, in]` → each token's own scale·B·A·x, for all targets of a linear; A by the plan `before` what h goes
    `through`, B by the one `after` it. `outputs`: the linear's targets, in order, and how many outputs each has."""
    h = _product(x, stack.a, grad=stack.a_grad, plan=before)
    if before is not None:
        h = h * before.scale
    h = through(h)
    parts = h.split(stack.block.rank, dim=-1)
    found = {
        target: _product(part.contiguous(), b, grad=g, plan=after)
        for target, part, b, g in zip(stack.block.targets, parts, stack.b, stack.b_grad, strict=True)
    }
    return assemble([found[t] if t in found else h.new_zeros(h.shape[0], size) for t, size in outputs.items()])


def _product(x: Tensor, weight: Tensor, *, grad: Tensor, plan: Plan | None) -> Tensor:
    """Without a plan this rank has only padding: zeros that depend on x, because their backward crosses ranks too."""
    if plan is None:
        return F.linear(x, weight.new_zeros(weight.shape[1:]))
    return grouped_linear(x, weight, grad=grad, plan=plan)


def concatenated(parts: list[Tensor]) -> Tensor:
    """gate, up → fc1; a single target as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def interleaved(groups: int) -> Assemble:
    """q, k, v → Megatron's qkv: for each of `groups` key-value groups its query heads, its key, its value."""

    def assemble(parts: list[Tensor]) -> Tensor:
        return torch.cat([p.unflatten(-1, (groups, -1)) for p in parts], dim=-1).flatten(-2)

    return assemble
