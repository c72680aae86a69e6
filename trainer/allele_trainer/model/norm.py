"""Root mean square norms with frozen weights: arXiv:1910.07467.

On a CPU torch makes the norm of a dozen operations and keeps what a gradient of the weight would need; on CUDA it has a
kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = w·x·ρ with ρ = (mean x² + ε)^−½ over the last dimension d, and ρ; `weight` `[…, d]`."""
    size = x.shape[-1]
    if x.is_cuda:
        y, scale = torch.ops.aten._fused_rms_norm(x, [size], None, eps)
        return y.mul_(weight), scale
    scale = (x * x).sum(-1, keepdim=True).mul_(1 / size).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


def normalised_backward(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """gx = ρ·(g − x·ρ²·mean(x·g)) with g = w·gy."""
    g, size = gradient * weight, x.shape[-1]
    if x.is_cuda:
        found: Tensor = torch.ops.aten._fused_rms_norm_backward(g, x, [size], scale, None, [True, False])[0]
        return found
    mean = (x * g).sum(-1, keepdim=True).mul_(1 / size).mul_(scale.square())
    return g.sub_(x * mean).mul_(scale)


class PackedRMSNorm(nn.RMSNorm):
    """Megatron's wrapper of torch's norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - torch does not declare it

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return super().forward(x)
        found: Tensor = _FrozenNorm.apply(x, self.weight, self.eps)
        return found


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = normalised(x, weight, eps)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, scale = ctx.saved_tensors
        return normalised_backward(grads[0], x, ctx.weight, scale), None, None
