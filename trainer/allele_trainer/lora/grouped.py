"""Grouped GEMM over rows of the bank, with gradients added straight into the bank's gradient rows.

Autograd on stacked weights would build a full-size zero gradient per adapter. Here weights are buffers, the backward
gives a gradient for the input only, and each active row's gradient is one addition to a view of G. Sums over
micro-batches, and later over data-parallel ranks, are therefore plain SUMs.
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
    return _GroupedLinear.apply(x, weight, grad, plan)


class _GroupedLinear(torch.autograd.Function):
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
        _accumulate(ctx.grad, F.grouped_mm(gy.t(), x, offs=plan.active_offsets), plan=plan)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = F.grouped_mm(gy, weight[plan.first : plan.last], offs=plan.offsets)
            gx[plan.tokens :].zero_()
        return gx, None, None, None


def _accumulate(grad: Tensor, update: Tensor, *, plan: Plan) -> None:
    if plan.dense:
        grad[plan.first : plan.last].add_(update)
    else:
        grad.index_add_(0, plan.active, update)
