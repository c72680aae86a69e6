"""Megatron linears with adapters: base output plus each token's own scale·B·A·x.

A and B are applied by separate operations with the `[T, k·r]` product between them: that is where a tensor-parallel
layout has its collective, so that it carries rank-sized and not hidden-sized activations. The whole of it is one node
of the autograd graph: a linear of a small model takes less time than the nodes it would otherwise be made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from allele_trainer.bank.layout import GROUPS
from allele_trainer.bank.rows import Stack
from allele_trainer.lora.grouped import add_outer, product, transposed
from allele_trainer.lora.plan import Part, current


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the outputs of a linear's targets are: of each of `groups` equal stretches, the same columns."""

    groups: int
    columns: Mapping[str, tuple[int, int]]
    """First column and number of columns."""

    def of(self, y: Tensor, stack: Stack) -> list[Tensor]:
        """`[T, out]` → `[T, groups, outputs / groups]` of each target that the stack has, or `[T, outputs]` where there
        is one group: views."""
        grouped = y if self.groups == 1 else y.view(y.shape[0], self.groups, -1)
        return [grouped.narrow(-1, *self.columns[target]) for target in stack.block.targets]


def outputs(linear: str, sizes: Sequence[int], *, groups: int = 1) -> Outputs:
    """Of a Megatron linear whose targets have `sizes` outputs.

    qkv has, for each of its key-value groups, the query heads, the key and the value; the others have one group.
    """
    columns, at = {}, 0
    for target, size in zip(GROUPS[linear], sizes, strict=True):
        columns[target] = at, size // groups
        at += size // groups
    return Outputs(groups, columns)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """What the `[T, k·r]` product of A goes through on its way to B, and its gradient on the way back, on a linear that
    tensor ranks share; None: nothing."""

    forward: Callable[[Tensor], Tensor] | None = None
    backward: Callable[[Tensor], Tensor] | None = None
    local_a: bool = False
    """A sees only the tokens of this rank's part of the sequence, or B does."""
    local_b: bool = False

    @property
    def alone(self) -> bool:
        return self.forward is None and self.backward is None


def crossing(*, by_inputs: bool, tp: int, sequence_parallel: bool) -> Crossing:
    """Of a linear split by outputs (B's rows; A whole), or by inputs (A's columns; B whole)."""
    if tp == 1:
        return Crossing()
    if sequence_parallel:
        return Crossing(_scattered, _gathered, local_b=True) if by_inputs else Crossing(_gathered, _scattered, True)
    return Crossing(_summed, None) if by_inputs else Crossing(None, _summed)


def _summed(h: Tensor) -> Tensor:
    dist.all_reduce(h, group=parallel_state.get_tensor_model_parallel_group())
    return h


def _gathered(h: Tensor) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    whole = h.new_empty(h.shape[0] * dist.get_world_size(group), h.shape[1])
    dist.all_gather_into_tensor(whole, h, group=group)
    return whole


def _scattered(h: Tensor) -> Tensor:
    """Summed over the ranks, each of which keeps its part of the tokens."""
    group = parallel_state.get_tensor_model_parallel_group()
    part = h.new_empty(h.shape[0] // dist.get_world_size(group), h.shape[1])
    dist.reduce_scatter_tensor(part, h, group=group)
    return part


class AdaptedLinear(nn.Module):
    """Wraps one linear of one layer; which banks and which slots come with the current plan."""

    def __init__(self, inner: nn.Module, *, site: tuple[int, str], outputs: Outputs, crossing: Crossing) -> None:
        super().__init__()
        self.inner = inner
        self.site, self._outputs, self._crossing = site, outputs, crossing

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        plan, way = current(), self._crossing
        here = with_stacks(plan.parts, self.site) if plan is not None else []
        if way.alone:  # also where no adapter is: the bits of a member without one here are then those in company
            return adapted_linear(x, self.inner.weight, Adapters(here, here, self._outputs)), None  # type: ignore[arg-type]
        if plan is None or not here:
            found: tuple[Tensor, Tensor | None] = self.inner(x, *args, **kwargs)
            return found
        y, bias = self.inner(x, *args, **kwargs)
        local = with_stacks(plan.local, self.site)
        width = max(_width(stack) for _, stack in here)
        adapters = Adapters(local if way.local_a else here, local if way.local_b else here, self._outputs, way, width)
        return adapted(x, y, adapters), bias


Adapted = Sequence[tuple[Part, Stack]]
"""Tokens, and the tensors that they meet."""


def with_stacks(parts: Sequence[Part], site: tuple[int, str]) -> Adapted:
    """Those whose bank has an adapter at this (layer, linear)."""
    return [(part, stack) for part in parts if (stack := part.bank.stacks.get(site)) is not None]


def _width(stack: Stack) -> int:
    """Columns of the product of A: a rank for each target."""
    return len(stack.block.targets) * stack.block.rank


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What tokens of a linear go through: A by the parts `before` the crossing, B by those `after` it."""

    before: Adapted
    after: Adapted
    outputs: Outputs
    crossing: Crossing = Crossing()
    width: int = 0
    """Columns that cross, the same on all ranks."""


_START = torch.zeros(0, requires_grad=True)
"""Given to each linear with adapters, so that its output has a gradient also where its input has none: below the first
adapter nothing is computed backward."""


def adapted(x: Tensor, y: Tensor, adapters: Adapters) -> Tensor:
    """Base outputs `[…, out]` of inputs `[…, in]` plus scale·B·A·x. Gradients of A and B are added to the banks'."""
    found: Tensor = _Adapted.apply(x, y, None, adapters, _START)
    return found


def adapted_linear(x: Tensor, weight: Tensor, adapters: Adapters) -> Tensor:
    """The same, base outputs included: those of a frozen weight `[out, in]` that one rank has whole."""
    found: Tensor = _Adapted.apply(x, None, weight, adapters, _START if adapters.before else None)
    return found


class _Adapted(torch.autograd.Function):
    """h = scale·A·x and y + B·h; on the way back gh = Bᵀ·gy, gx = scale·Aᵀ·gh, and Σ gy⊗h, Σ scale·gh⊗x for B and A."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor | None, adapters: Adapters, _start: Tensor | None
    ) -> Tensor:
        flat = _flat(x)
        if weight is None:
            total = y.clone(memory_format=torch.contiguous_format)
        else:  # flat: of `[T, 1, in]` torch may make a batch of T products
            total = torch.mm(flat, weight.t()).view(*x.shape[:-1], -1)
        found = [product(flat[p.begin : p.end], stack.a, p).mul_(p.scale) for p, stack in adapters.before]
        if adapters.crossing.forward:
            h = adapters.crossing.forward(_joined(found, adapters.before, flat.new_zeros(len(flat), adapters.width)))
            found = _split(h, adapters.after)
        for h, (part, stack) in zip(found, adapters.after, strict=True):
            places = adapters.outputs.of(_flat(total)[part.begin : part.end], stack)
            for place, b, column in zip(places, stack.b, h.chunk(len(stack.b), dim=1), strict=True):
                place.add_(product(column, b, part).view(place.shape))
        ctx.save_for_backward(x)
        ctx.adapters, ctx.products, ctx.weight = adapters, found, weight
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        adapters: Adapters = ctx.adapters
        (x,), gy = ctx.saved_tensors, _flat(grads[0].contiguous())
        found = []
        for h, (part, stack) in zip(ctx.products, adapters.after, strict=True):
            gradients, columns = [], h.chunk(len(stack.b), dim=1)
            places = adapters.outputs.of(gy[part.begin : part.end], stack)
            for place, b, b_grad, column in zip(places, stack.b, stack.b_grad, columns, strict=True):
                of_target = place.flatten(1)
                add_outer(b_grad, of_target, column, part)
                gradients.append(transposed(of_target, b, part))
            found.append(gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim=1))
        if adapters.crossing.backward:
            gh = adapters.crossing.backward(_joined(found, adapters.after, gy.new_zeros(len(gy), adapters.width)))
            found = _split(gh, adapters.before)
        flat = _flat(x)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = torch.zeros_like(flat) if ctx.weight is None else gy @ ctx.weight
        for gh, (part, stack) in zip(found, adapters.before, strict=True):
            scaled = gh.mul_(part.scale)
            add_outer(stack.a_grad, scaled, flat[part.begin : part.end], part)
            if gx is not None:
                gx[part.begin : part.end].add_(transposed(scaled, stack.a, part))
        return None if gx is None else gx.view_as(x), grads[0] if ctx.weight is None else None, None, None, None


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _joined(parts: Sequence[Tensor], adapted: Adapted, whole: Tensor) -> Tensor:
    """`[tokens of the part, its width]` each → `[T, width]`, zero where no part is."""
    for h, (part, _) in zip(parts, adapted, strict=True):
        whole[part.begin : part.end, : h.shape[1]] = h
    return whole


def _split(whole: Tensor, adapted: Adapted) -> list[Tensor]:
    return [whole[part.begin : part.end, : _width(stack)] for part, stack in adapted]
