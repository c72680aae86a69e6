"""Megatron modules for packed sequences: attention, rotary positions, a layer with its batch, logits of wanted rows.

Megatron's local attention takes one sequence per batch column. Adapters need tokens ordered by slot, and padding every
sequence to the longest wastes most of a batch; so hidden states are `[T, 1, h]` and attention alone sees sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from allele_trainer.lora.plan import routed
from allele_trainer.model.batch import PackedBatch, running


class SequenceParallelRMSNorm(nn.RMSNorm):
    """Megatron's wrapper of torch's norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - torch does not declare it


class Rotary(nn.Module):
    """Cosines and sines of each token's own position; the table grows with the longest sequence seen."""

    def __init__(self, frequencies: Tensor) -> None:
        """`frequencies` `[head_dim / 2]`"""
        super().__init__()
        self._frequencies = frequencies
        self._cos = self._sin = frequencies.new_empty(0, frequencies.numel())

    def forward(self, positions: Tensor, longest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`[T]` positions below `longest` → `[T, 1, head_dim / 2]` each."""
        if self._cos.shape[0] < longest:
            angles = torch.outer(torch.arange(longest, device=positions.device).float(), self._frequencies)
            self._cos, self._sin = angles.cos(), angles.sin()
        cos, sin = (table.index_select(0, positions)[:, None].to(dtype) for table in (self._cos, self._sin))
        return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, into: Tensor) -> None:
    """Each pair (x[i], x[i + head_dim / 2]) turned by its angle: arXiv:2104.09864, in Hugging Face's order of features.

    Products and sums are rounded one by one: a fused kernel would round the tail of a vector otherwise than its middle.
    """
    (first, second), (one, two) = x.chunk(2, dim=-1), into.chunk(2, dim=-1)
    torch.mul(first, cos, out=one)
    torch.mul(second, cos, out=two)
    one.sub_(second * sin)
    two.add_(first * sin)


class _Sequences(torch.autograd.Function):
    """Queries and keys `[T, heads, d]`, turned, and values → `[sequences, width, heads, d]` of each bucket.

    First all queries, then keys, then values. Every token is in one place of one bucket: its gradient is read from
    there, nothing is added up.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch) -> tuple[Tensor, ...]:
        ctx.batch = batch
        padded = [x.new_empty(x.shape[0] + 1, *x.shape[1:]) for x in (query, key, value)]
        for x, into in zip((query, key), padded, strict=False):
            _rotate(x, *batch.rotary, into=into[:-1])
        padded[2][:-1] = value
        for into in padded:
            into[-1].zero_()
        return tuple(x.index_select(0, b.gather).view(-1, b.width, *x.shape[1:]) for x in padded for b in batch.buckets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        batch: PackedBatch = ctx.batch
        n = len(batch.buckets)
        query, key, value = (_tokens(grads[i : i + n], batch.scatter) for i in (0, n, 2 * n))
        cos, sin = batch.rotary
        for x in (query, key):
            _rotate(x.clone(), cos, -sin, into=x)
        return query, key, value, None


class _Tokens(torch.autograd.Function):
    """Outputs `[sequences, width, heads, d]` of each bucket → `[T, heads, d]`, zero for padding."""

    @staticmethod
    def forward(ctx: Any, batch: PackedBatch, *outputs: Tensor) -> Tensor:
        ctx.batch = batch
        return _tokens(outputs, batch.scatter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        batch: PackedBatch = ctx.batch
        padded = torch.cat([grads[0], grads[0].new_zeros(1, *grads[0].shape[1:])])
        return None, *(padded.index_select(0, b.gather).view(-1, b.width, *padded.shape[1:]) for b in batch.buckets)


def _tokens(parts: Sequence[Tensor], scatter: Tensor) -> Tensor:
    rows = [x.flatten(0, 1) for x in parts]
    return torch.cat([*rows, rows[0].new_zeros(1, *rows[0].shape[1:])]).index_select(0, scatter)


class PackedAttention(MegatronModule):
    """Causal attention within each sequence, rotary positions included: one kernel per bucket of equal width.

    A sequence's width depends on its own length alone, never on its neighbours, and with it the bits of the result.
    """

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self._scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedBatch,
        **_: Any,
    ) -> Tensor:
        """query `[T, 1, heads, d]`, key and value `[T, 1, groups, d]` → `[T, 1, heads·d]`."""
        batch = packed_seq_params
        parts = _Sequences.apply(query[:, 0], key[:, 0], value[:, 0], batch)
        n = len(batch.buckets)
        outputs = [self._attend(*qkv) for qkv in zip(parts[:n], parts[n : 2 * n], parts[2 * n :], strict=True)]
        found: Tensor = _Tokens.apply(batch, *outputs)
        return found.flatten(1)[:, None]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[sequences, width, heads, d]` each."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=self._scale)
        return found.transpose(1, 2)


class PackedLayer(TransformerLayer):
    """Enters the micro-batch that it was called with and its plan, also when it is run again for its backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch: PackedBatch = kwargs["packed_seq_params"]
        with running(batch), routed(batch.plan):
            return super().forward(*args, **kwargs)


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
