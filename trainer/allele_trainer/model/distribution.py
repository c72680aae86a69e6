"""Next-token distributions from logits that may be split over tensor ranks by vocabulary.

Each tensor rank has the logits of its part of the vocabulary. A maximum, a sum of exponentials and the logits of wanted
ids cross the ranks: `[n]` or `[n, k]`, never `[n, vocab]`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Distribution:
    """`logits` fp32 `[n, v]`, those of ids `first` to `first + v − 1`; `group`: the tensor ranks, None for one.

    `normaliser` `[n]` has a gradient; `entropy` `[n]`, in nats, has none.
    """

    logits: Tensor
    normaliser: Tensor
    entropy: Tensor
    vocab: int
    first: int
    group: dist.ProcessGroup | None

    def at(self, ids: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """Log-probabilities of `ids` `[m]` or `[m, k]` under all n = m rows, or under `rows` `[m]`."""
        normaliser = self.normaliser if rows is None else self.normaliser.index_select(0, rows)
        rows = torch.arange(ids.shape[0], device=ids.device) if rows is None else rows
        if ids.dim() == 1:
            return self._logits_at(ids, rows) - normaliser
        return self._logits_at(ids, rows[:, None]) - normaliser[:, None]

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k most likely ids of each row (all, if the vocabulary has fewer) and their log-probabilities, without
        gradient: `[n, k]` each, the likeliest first."""
        logits, k = self.logits.detach(), min(k, self.vocab)
        if self.group is not None and logits.shape[1] < k:  # ranks exchange as many each
            logits = torch.nn.functional.pad(logits, (0, k - logits.shape[1]), value=-torch.inf)
        values, ids = logits.topk(k, dim=1)
        ids = ids + self.first
        if self.group is not None:
            values, ids = _gathered(values, self.group), _gathered(ids, self.group)
            values, best = values.topk(k, dim=1)
            ids = ids.gather(1, best)
        return ids, values - self.normaliser.detach()[:, None]

    def _logits_at(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Of ids in rows that broadcast to them."""
        size = self.logits.shape[1]
        if self.group is None:
            return self.logits.take(rows * size + ids)
        column = ids - self.first
        mine = (column >= 0) & (column < size)
        if size:
            found = torch.where(mine, self.logits.take(rows * size + torch.where(mine, column, 0)), 0)
        else:
            found = self.normaliser.new_zeros(ids.shape)
        total: Tensor = _Summed.apply(found, self.group)
        return total


def distribution(logits: Tensor, *, rows: int, vocab: int, group: dist.ProcessGroup | None) -> Distribution:
    """Of the first `rows` of logits `[≥rows, vocab / tp]`; `group`: the tensor ranks, None for the only one.

    Columns beyond the vocabulary, which make the parts equal, do not count.
    """
    first = 0 if group is None else dist.get_rank(group) * logits.shape[1]
    found = logits[:rows, : max(vocab - first, 0)].float()
    normaliser, entropy = _Normaliser.apply(found, group)
    return Distribution(found, normaliser, entropy, vocab, first, group)


class _Normaliser(torch.autograd.Function):
    """log Σ exp of each row, and the entropy of the row's distribution."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        peak = logits.amax(1) if logits.shape[1] else logits.new_full(logits.shape[:1], -torch.inf)
        if group is not None:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - peak[:, None]
        exponentials = shifted.exp()
        sums = torch.stack([exponentials.sum(1), shifted.mul_(exponentials).sum(1)])
        if group is not None:
            dist.all_reduce(sums, group=group)
        total, energy = sums
        entropy = total.log() - energy / total
        ctx.save_for_backward(exponentials.div_(total[:, None]))
        ctx.mark_non_differentiable(entropy)
        return peak + total.log(), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (probabilities,) = ctx.saved_tensors
        return probabilities * grads[0][:, None], None


class _Summed(torch.autograd.Function):
    """Summed over the ranks; each one's share has the gradient of the sum."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _gathered(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[n, k]` of each rank → `[n, ranks·k]`"""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, dim=1)
