"""Products of tokens with the rows of a bank that they belong to, and gradients added straight to the bank's G.

Autograd on stacked weights would build a full-size zero gradient per adapter. Here weights are buffers, and each active
row's gradient is one addition to a view of G. Sums over micro-batches, and later over data-parallel ranks, are
therefore plain SUMs.

Four kernels, with the same bits on a CPU, so that a member's may be another one in company than alone:

- `_Single`: a part of one slot.
- `_Grouped`: torch's grouped GEMM; slots without tokens between others are empty groups.
- `_Batched`: on CPU, where all slots of a part have equally many tokens: one strided batched GEMM, without what the
  grouped one costs per group there. Tiny products it would compute by another kernel: they stay grouped.
- `_SlotBySlot`: what the grouped kernel refuses. It wants rows of a multiple of 16 bytes, and bfloat16 on CUDA; ranks 1
  and 2 have a layout in a row that is fixed by the adapter's format.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from allele_trainer.lora.plan import Part

_TINY = 400
"""torch's batched product on CPU goes another way for fewer multiplications than this."""


def product(x: Tensor, weight: Tensor, part: Part) -> Tensor:
    """`y[t] = weight[slot(t)] @ x[t]`: x `[tokens of the part, in]` → `[tokens, out]`; weight `[rows, out, in]`."""
    return _kernel(x, weight, part).product(x, weight, part)


def transposed(gy: Tensor, weight: Tensor, part: Part) -> Tensor:
    """`gx[t] = weight[slot(t)]ᵀ @ gy[t]`: `[tokens, out]` → `[tokens, in]`."""
    return _kernel(gy, weight, part).transposed(gy, weight, part)


def add_outer(grad: Tensor, gy: Tensor, x: Tensor, part: Part) -> None:
    """`grad[row(slot)] += Σ gy[t] ⊗ x[t]` over the slot's tokens; grad `[gradient rows, out, in]`."""
    _kernel(x, grad, part).add_outer(grad, gy, x, part)


class _Kernel(Protocol):
    @staticmethod
    def product(x: Tensor, weight: Tensor, part: Part) -> Tensor: ...

    @staticmethod
    def transposed(gy: Tensor, weight: Tensor, part: Part) -> Tensor: ...

    @staticmethod
    def add_outer(grad: Tensor, gy: Tensor, x: Tensor, part: Part) -> None: ...


def _kernel(x: Tensor, weight: Tensor, part: Part) -> type[_Kernel]:
    """Rows of a bank start at multiples of 64 bytes: whether a kernel takes its views is up to their own sizes."""
    if len(part.spans) == 1:
        return _Single
    _, out, into = weight.shape
    on_cuda, dtype = x.is_cuda, x.dtype
    unit = 16 // dtype.itemsize
    if out % unit or into % unit or weight.storage_offset() % unit or (on_cuda and dtype != torch.bfloat16):
        return _SlotBySlot
    if part.each and part.each * out * into >= _TINY and not on_cuda and dtype == torch.float32:
        return _Batched
    return _Grouped


class _Single:
    @staticmethod
    def product(x: Tensor, weight: Tensor, part: Part) -> Tensor:
        return torch.mm(x, weight[part.first].t())

    @staticmethod
    def transposed(gy: Tensor, weight: Tensor, part: Part) -> Tensor:
        return torch.mm(gy, weight[part.first])

    @staticmethod
    def add_outer(grad: Tensor, gy: Tensor, x: Tensor, part: Part) -> None:
        grad[part.rows[0]].add_(torch.mm(gy.t(), x))


class _Grouped:
    @staticmethod
    def product(x: Tensor, weight: Tensor, part: Part) -> Tensor:
        return F.grouped_mm(x, weight[part.first : part.last].transpose(1, 2), offs=part.offsets)

    @staticmethod
    def transposed(gy: Tensor, weight: Tensor, part: Part) -> Tensor:
        return F.grouped_mm(gy, weight[part.first : part.last], offs=part.offsets)

    @staticmethod
    def add_outer(grad: Tensor, gy: Tensor, x: Tensor, part: Part) -> None:
        _add(grad, F.grouped_mm(gy.t(), x, offs=part.active_offsets), part)


class _Batched:
    @staticmethod
    def product(x: Tensor, weight: Tensor, part: Part) -> Tensor:
        return torch.bmm(_by_slot(x, part), weight[part.first : part.last].transpose(1, 2)).flatten(0, 1)

    @staticmethod
    def transposed(gy: Tensor, weight: Tensor, part: Part) -> Tensor:
        return torch.bmm(_by_slot(gy, part), weight[part.first : part.last]).flatten(0, 1)

    @staticmethod
    def add_outer(grad: Tensor, gy: Tensor, x: Tensor, part: Part) -> None:
        _add(grad, torch.bmm(_by_slot(gy, part).transpose(1, 2), _by_slot(x, part)), part)


class _SlotBySlot:
    @staticmethod
    def product(x: Tensor, weight: Tensor, part: Part) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[1])
        for slot, begin, end in part.spans:
            torch.mm(x[begin:end], weight[slot].t(), out=y[begin:end])
        return y

    @staticmethod
    def transposed(gy: Tensor, weight: Tensor, part: Part) -> Tensor:
        gx = gy.new_empty(gy.shape[0], weight.shape[2])
        for slot, begin, end in part.spans:
            torch.mm(gy[begin:end], weight[slot], out=gx[begin:end])
        return gx

    @staticmethod
    def add_outer(grad: Tensor, gy: Tensor, x: Tensor, part: Part) -> None:
        for (_, begin, end), row in zip(part.spans, part.rows, strict=True):
            grad[row].add_(torch.mm(gy[begin:end].t(), x[begin:end]))


def _by_slot(x: Tensor, part: Part) -> Tensor:
    """`[tokens, k]` → `[slots, tokens of each, k]`"""
    return x.view(part.last - part.first, -1, x.shape[1])


def _add(grad: Tensor, update: Tensor, part: Part) -> None:
    if isinstance(part.active, slice):
        grad[part.active].add_(update)
    else:
        grad.index_add_(0, part.active, update.to(grad.dtype))
