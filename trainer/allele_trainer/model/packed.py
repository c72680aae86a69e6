"""Megatron modules for packed sequences `[T, 1, h]`: norm, MLP, a layer with its batch, logits of wanted rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from allele_trainer.lora.plan import routed
from allele_trainer.model.attention import Rotary
from allele_trainer.model.batch import PackedBatch, running


class PackedRMSNorm(nn.RMSNorm):
    """Megatron's wrapper of torch's norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - torch does not declare it

    def forward(self, x: Tensor) -> Tensor:
        """On a CPU torch makes the norm of a dozen operations; on CUDA it has a kernel."""
        if x.is_cuda:
            return super().forward(x)
        found: Tensor = _FrozenNorm.apply(x, self.weight, self.eps)
        return found


class _FrozenNorm(torch.autograd.Function):
    """y = w·x·ρ with ρ = (mean x² + ε)^−½; back g' = w·g, gx = ρ·(g' − x·ρ²·mean(x·g')): arXiv:1910.07467."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, scale = ctx.saved_tensors
        g = grads[0] * ctx.weight
        mean = (x * g).mean(-1, keepdim=True).mul_(scale.square())
        return g.sub_(x * mean).mul_(scale), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate)·up of `[…, gate | up]`: arXiv:2002.05202."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), gx = ctx.saved_tensors, torch.empty_like(ctx.saved_tensors[0])
        (gate, up), (g_gate, g_up) = x.chunk(2, dim=-1), gx.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=g_up)
        torch.ops.aten.silu_backward(grads[0] * up, gate, grad_input=g_gate)
        return gx


def swiglu(x: Tensor) -> Tensor:
    """`[…, 2f]` → `[…, f]`"""
    found: Tensor = _SwiGLU.apply(x)
    return found


class SwiGLU(nn.Module):
    """In the place of Transformer Engine's activation, which is the one that Megatron hands gate and up together."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class PackedLayer(TransformerLayer):
    """Enters the micro-batch that it was called with and its plan, also when it is run again for its backward.

    Computes what Megatron's own forward does without dropout, biases, caches and offloading: what that one spends on
    asking for them is as long as a small layer takes.
    """

    def forward(self, hidden_states: Tensor, *_: Any, packed_seq_params: PackedBatch, **__: Any) -> tuple[Tensor, None]:
        batch = packed_seq_params
        with running(batch), routed(batch.plan):
            middle = hidden_states + self.self_attention(self.input_layernorm(hidden_states), batch)
            return middle + self.mlp(self.pre_mlp_layernorm(middle))[0], None


class PackedGPTModel(GPTModel):
    """Computes logits only of the rows that the batch asks for: prompts and padding cost no vocabulary GEMM."""

    def __init__(self, *, config: Any, frequencies: Tensor, **kwargs: Any) -> None:
        super().__init__(config=config, position_embedding_type="none", **kwargs)
        self.rotary = Rotary(frequencies)
        if self.post_process:
            self.output_layer.sequence_parallel = False  # wanted rows are taken from the tokens of all tensor ranks

    def forward(self, *args: Any, packed_seq_params: PackedBatch, **kwargs: Any) -> Tensor:
        batch = packed_seq_params
        batch.rotary = self.rotary(batch.positions, batch.longest, self.config.params_dtype)
        output: Tensor = super().forward(*args, packed_seq_params=batch, **kwargs)
        return output

    def _postprocess(self, hidden_states: Tensor, *args: Any, packed_seq_params: PackedBatch, **kwargs: Any) -> Tensor:
        if self.post_process:
            if self.config.sequence_parallel:
                # The head sums the gradients of tensor ranks itself: each takes its own tokens' part of that sum.
                hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
            hidden_states = hidden_states.index_select(0, packed_seq_params.rows)
        return super()._postprocess(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
