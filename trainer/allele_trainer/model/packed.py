"""Megatron modules for packed sequences `[T, 1, h]`: MLP, a layer with its batch, logits of wanted rows."""

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

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits `[R, vocab / tp]` on the last stage, hidden states `[T, 1, h]` before."""
        batch.rotary = self.rotary(batch.positions, batch.longest, self.config.params_dtype)
        hidden = self.embedding(batch.tokens[None], None) if self.pre_process else self.decoder.input_tensor
        if self.config.recompute_granularity:
            hidden = self.decoder(hidden, None, packed_seq_params=batch)
        else:
            for layer in self.decoder.layers:
                hidden, _ = layer(hidden, packed_seq_params=batch)
            if self.post_process:
                hidden = self.decoder.final_layernorm(hidden)
        return self._logits(hidden, batch) if self.post_process else hidden

    def _logits(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        if self.config.sequence_parallel:
            # The head sums the gradients of tensor ranks itself: each takes its own tokens' part of that sum.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        wanted = hidden.index_select(0, batch.rows)
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        if self.config.tensor_model_parallel_size == 1:
            return F.linear(wanted.squeeze(1), weight)
        logits: Tensor = self.output_layer(wanted, weight=weight)[0]
        return logits.squeeze(1)
