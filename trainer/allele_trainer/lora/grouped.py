"""Grouped GEMM over rows of the bank, with gradients added straight into the bank's gradient rows.

Autograd on stacked weights would build a full-size zero gradient per adapter. Here weights are buffers, the backward
gives a gradient for the input only, and each active row's gradient is one addition to a view of G. Sums over
micro-batches, and later over data-parallel ranks, are therefore plain SUMs.

torch's grouped kernel wants rows of a multiple of 16 bytes, and bfloat16 on CUDA. What it refuses (ranks 1 and 2, whose
layout in a row is fixed by the adapter's format) is computed slot by slot; which of the two never depends on the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allele_trainer.lora.plan import Plan


def grouped_linear(x: Tensor, weight: Tensor, *, grad: Tensor, plan: Plan) -> Tensor:
    """`y[t] = weight[slot(t)] @ x[t]`: x `[T, in]` → `[T, out]`; padding rows of y are zero.

    `weight` and `grad` are views `[rows, out, in]` of the bank; the weight's gradient is added to `grad`.
    """
    kernel = _Grouped if _fits(weight) else _SlotBySlot
    return kernel.apply(x, weight, grad, plan)


def _fits(weight: Tensor) -> bool:
    """Whether torch's grouped kernel takes these views and every activation that meets them."""
    unit = 16 // weight.element_size()
    sizes = (*weight.shape[1:], weight.stride(0), weight.storage_offset())
    return all(n % unit == 0 for n in sizes) and not (weight.is_cuda and weight.dtype != torch.bfloat16)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grad: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grad, ctx.plan = grad, plan
        y = F.grouped_mm(x, weight[plan.first : plan.last].transpose(1, 2), offs=plan.offsets)
        y[plan.tokens :].zero_()  # grouped_mm leaves rows behind the last group undefined
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        plan: Plan = ctx.plan
        gy = grads[0].contiguous()  # grouped_mm refuses expanded gradients such as those of a sum
        update = F.grouped_mm(gy.t(), x, offs=plan.active_offsets)
        if plan.rows is not None:
            ctx.grad[plan.rows.start : plan.rows.stop].add_(update)
        else:
            ctx.grad.index_add_(0, plan.active, update)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = F.grouped_mm(gy, weight[plan.first : plan.last], offs=plan.offsets)
            gx[plan.tokens :].zero_()
        return gx, None, None, None


class _SlotBySlot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grad: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grad, ctx.plan = grad, plan
        y = x.new_zeros(x.shape[0], weight.shape[1])
        for slot, begin, end in plan.spans:
            torch.mm(x[begin:end], weight[slot].t(), out=y[begin:end])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        gy = grads[0].contiguous()
        gx = torch.zeros_like(x)
        for (slot, begin, end), row in zip(ctx.plan.spans, ctx.plan.active.tolist(), strict=True):
            ctx.grad[row].addmm_(gy[begin:end].t(), x[begin:end])
            torch.mm(gy[begin:end], weight[slot], out=gx[begin:end])
        return gx, None, None, None
