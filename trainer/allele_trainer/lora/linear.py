"""Megatron linears with adapters: base output plus each token's own B·A·x.

A and B are applied by separate operations with the `[T, k·r]` product between them: that is where a tensor-parallel
layout puts its collective, so that it carries rank-sized and not hidden-sized activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from allele_trainer.bank.layout import GROUPS
from allele_trainer.bank.rows import Stack
from allele_trainer.lora.grouped import grouped_linear
from allele_trainer.lora.plan import Plan, current

Assemble = Callable[[list[Tensor]], Tensor]
"""Outputs `[T, out_j]` of a group's targets → `[T, out]` in the order of the Megatron linear."""


class AdaptedLinear(nn.Module):
    """Wraps one linear of one layer; which bank and which slots come with the current plan."""

    def __init__(
        self, inner: nn.Module, *, site: tuple[int, str], outputs: tuple[int, ...], assemble: Assemble
    ) -> None:
        super().__init__()
        self.inner = inner
        self._site, self._outputs, self._assemble = site, outputs, assemble

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        y, bias = self.inner(x, *args, **kwargs)
        plan = current()
        stack = plan.bank.stacks.get(self._site) if plan is not None else None
        if plan is None or stack is None:
            return y, bias
        delta = self._delta(x.reshape(-1, x.shape[-1]), stack=stack, plan=plan)
        return y + delta.view_as(y), bias

    def _delta(self, x: Tensor, *, stack: Stack, plan: Plan) -> Tensor:
        h = grouped_linear(x, stack.a, grad=stack.a_grad, plan=plan) * plan.scale
        parts = h.split(stack.block.rank, dim=-1)
        found = {
            target: grouped_linear(part.contiguous(), b, grad=g, plan=plan)
            for target, part, b, g in zip(stack.block.targets, parts, stack.b, stack.b_grad, strict=True)
        }
        return self._assemble(
            [
                found[target] if target in found else x.new_zeros(x.shape[0], outputs)
                for target, outputs in zip(GROUPS[self._site[1]], self._outputs, strict=True)
            ]
        )


def concatenated(parts: list[Tensor]) -> Tensor:
    """gate, up → fc1; a single target as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def interleaved(groups: int) -> Assemble:
    """q, k, v → Megatron's qkv: for each of `groups` key-value groups its query heads, its key, its value."""

    def assemble(parts: list[Tensor]) -> Tensor:
        return torch.cat([p.unflatten(-1, (groups, -1)) for p in parts], dim=-1).flatten(-2)

    return assemble
