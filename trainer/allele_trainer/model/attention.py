"""Causal attention within each sequence of a packed batch, with rotary positions.

Megatron's local attention takes one sequence per batch column. Adapters need tokens ordered by slot, and padding every
sequence to the longest wastes most of a batch; so hidden states are `[T, 1, h]` and attention alone sees sequences.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from allele_trainer.model.batch import PackedBatch
from allele_trainer.model.norm import normalised, normalised_backward

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
        """`[T]` positions below `longest` → `[T, 1, 1, head_dim / 2]` each."""
        if self._cos.shape[0] < longest:
            size = -(-longest // _TABLE) * _TABLE
            angles = torch.outer(torch.arange(size, device=positions.device).float(), self._frequencies)
            self._cos, self._sin = angles.cos(), angles.sin()
        cos, sin = (table.index_select(0, positions)[:, None, None].to(dtype) for table in (self._cos, self._sin))
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


@dataclasses.dataclass(frozen=True)
class HeadNorm:
    """Of the queries and the key of a group: `weight` `[queries + 1, d]`."""

    weight: Tensor
    eps: float


class _Sequences(torch.autograd.Function):
    """`[T, groups, queries + key + value, d]` → `[sequences, heads, width, d]` of each bucket: all queries, then keys,
    then values. Queries and keys are normalised, where the model does, and turned.

    Every token is in one place of one bucket: its gradient is read from there, nothing is added up.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, batch: PackedBatch, norm: HeadNorm | None) -> tuple[Tensor, ...]:
        heads, scale = mixed[:, :, :-1], None
        if norm is not None:
            heads, scale = normalised(heads, norm.weight, norm.eps)
        padded = mixed.new_empty(mixed.shape[0] + 1, *mixed.shape[1:])
        _rotate(heads, *batch.rotary, into=padded[:-1, :, :-1])
        padded[:-1, :, -1] = mixed[:, :, -1]
        padded[-1].zero_()
        ctx.save_for_backward(mixed, scale)
        ctx.batch, ctx.norm = batch, norm
        found = [padded.index_select(0, b.gather).view(-1, b.width, *mixed.shape[1:]) for b in batch.buckets]
        parts = [x[..., :-2, :].flatten(2, 3) for x in found] + [x[..., i, :] for i in (-2, -1) for x in found]
        return tuple(x.transpose(1, 2) for x in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        batch, norm = ctx.batch, ctx.norm
        mixed, scale = ctx.saved_tensors
        groups, n = mixed.shape[1], len(batch.buckets)
        grouped = [x.transpose(1, 2).unflatten(2, (groups, -1)) for x in grads]
        parts = [torch.cat(qkv, dim=3) for qkv in zip(grouped[:n], grouped[n : 2 * n], grouped[2 * n :], strict=True)]
        gradient = _tokens(parts, batch.scatter)
        found = torch.empty_like(mixed)
        turned = found[:, :, :-1] if norm is None else torch.empty_like(found[:, :, :-1])
        _rotate(gradient[:, :, :-1], *batch.rotary, into=turned, back=True)
        if norm is not None:
            found[:, :, :-1] = normalised_backward(turned, mixed[:, :, :-1], norm.weight, scale)
        found[:, :, -1] = gradient[:, :, -1]
        return found, None, None


class _Tokens(torch.autograd.Function):
    """Outputs `[sequences, heads, width, d]` of each bucket → `[T, heads, d]`, zero for padding."""

    @staticmethod
    def forward(ctx: Any, batch: PackedBatch, *outputs: Tensor) -> Tensor:
        ctx.batch = batch
        return _tokens([x.transpose(1, 2) for x in outputs], batch.scatter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        batch: PackedBatch = ctx.batch
        padded = torch.cat([grads[0], grads[0].new_zeros(1, *grads[0].shape[1:])])
        parts = [padded.index_select(0, b.gather).view(-1, b.width, *padded.shape[1:]) for b in batch.buckets]
        return None, *(x.transpose(1, 2) for x in parts)


def _tokens(parts: Sequence[Tensor], scatter: Tensor) -> Tensor:
    """`[sequences, width, …]` of each bucket → `[T, …]`"""
    rows = [x.flatten(0, 1) for x in parts]
    return torch.cat([*rows, rows[0].new_zeros(1, *rows[0].shape[1:])]).index_select(0, scatter)


class PackedAttention(SelfAttention):
    """Causal attention within each sequence, rotary positions included: one kernel per bucket of equal width.

    A sequence's width depends on its own length alone, never on its neighbours, and with it the bits of the result.
    """

    @functools.cached_property
    def _norm(self) -> HeadNorm | None:
        if not self.config.qk_layernorm:
            return None
        queries = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        of_query, of_key = self.q_layernorm.weight.detach(), self.k_layernorm.weight.detach()
        return HeadNorm(torch.stack([*[of_query] * queries, of_key]), self.q_layernorm.eps)

    def forward(self, hidden_states: Tensor, batch: PackedBatch) -> Tensor:
        """`[T, 1, h]` → `[T, 1, h]`"""
        mixed = self.linear_qkv(hidden_states)[0]
        size, groups = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        parts = _Sequences.apply(mixed.view(mixed.shape[0], groups, -1, size), batch, self._norm)
        n = len(batch.buckets)
        outputs = [
            F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
            for qkv in zip(parts[:n], parts[n : 2 * n], parts[2 * n :], strict=True)
        ]
        found: Tensor = _Tokens.apply(batch, *outputs)
        output: Tensor = self.linear_proj(found.flatten(1)[:, None])[0]
        return output
