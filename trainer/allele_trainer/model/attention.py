"""Causal attention within each sequence of a packed batch, with rotary positions.

Megatron's local attention takes one sequence per batch column. Adapters need tokens ordered by slot, and padding every
sequence to the longest wastes most of a batch; so hidden states are `[T, 1, h]` and attention alone sees sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from allele_trainer.model.batch import PackedBatch

_TABLE = 256
"""Positions by which the table of angles grows."""


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
            size = -(-longest // _TABLE) * _TABLE
            angles = torch.outer(torch.arange(size, device=positions.device).float(), self._frequencies)
            self._cos, self._sin = angles.cos(), angles.sin()
        cos, sin = (table.index_select(0, positions)[:, None].to(dtype) for table in (self._cos, self._sin))
        return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, into: Tensor, back: bool = False) -> None:
    """Each pair (x[i], x[i + head_dim / 2]) turned by its angle: arXiv:2104.09864, in Hugging Face's order of features.

    Products and sums are rounded one by one: a fused kernel would round the tail of a vector otherwise than its middle.
    """
    (first, second), (one, two) = x.chunk(2, dim=-1), into.chunk(2, dim=-1)
    torch.mul(first, cos, out=one)
    torch.mul(second, cos, out=two)
    if back:
        one.add_(second * sin)
        two.sub_(first * sin)
    else:
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
        turned = [torch.empty_like(x) for x in (query, key)]
        for x, into in zip((query, key), turned, strict=True):
            _rotate(x, *batch.rotary, into=into, back=True)
        return *turned, value, None


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


class PackedAttention(SelfAttention):
    """Causal attention within each sequence, rotary positions included: one kernel per bucket of equal width.

    A sequence's width depends on its own length alone, never on its neighbours, and with it the bits of the result.
    """

    def forward(self, hidden_states: Tensor, batch: PackedBatch) -> Tensor:
        """`[T, 1, h]` → `[T, 1, h]`"""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        parts = _Sequences.apply(query.squeeze(1), key.squeeze(1), value.squeeze(1), batch)
        n = len(batch.buckets)
        outputs = [_attend(*qkv) for qkv in zip(parts[:n], parts[n : 2 * n], parts[2 * n :], strict=True)]
        found: Tensor = _Tokens.apply(batch, *outputs)
        output: Tensor = self.linear_proj(found.flatten(1)[:, None])[0]
        return output


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`[sequences, width, heads, d]` each."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
