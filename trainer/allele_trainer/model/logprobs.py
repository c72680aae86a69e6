"""Log-probabilities of the wanted tokens from logits that may be split over tensor ranks.

Each tensor rank has the logits of its part of the vocabulary. A maximum, a sum of exponentials and the target's logit
per row cross the ranks: `[R]` each, never `[R, vocab]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def target_logprobs(logits: Tensor, targets: Tensor, *, vocab: int, group: dist.ProcessGroup | None) -> Tensor:
    """logits `[≥n, vocab / tp]`, targets `[n]` ids → `[n]` fp32; `group`: the tensor ranks, None for the only one.

    Columns beyond the vocabulary, which make the parts equal, do not count.
    """
    logits = logits[: targets.numel()].float()
    if group is None:
        return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
    first = dist.get_rank(group) * logits.shape[1]
    found: Tensor = _SplitVocabulary.apply(logits[:, : max(vocab - first, 0)], targets - first, group)
    return found


class _SplitVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        rows, size = logits.shape
        largest = logits.amax(1) if size else logits.new_full((rows,), -torch.inf)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exponentials = (logits - largest[:, None]).exp()
        total = exponentials.sum(1)
        mine = (targets >= 0) & (targets < size)
        column = torch.where(mine, targets, 0)
        logit = torch.where(mine, logits.gather(1, column[:, None])[:, 0], 0) if size else torch.zeros_like(total)
        dist.all_reduce(total, group=group)
        dist.all_reduce(logit, group=group)
        ctx.save_for_backward(exponentials.div_(total[:, None]), column, mine)
        return logit - largest - total.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        probabilities, column, mine = ctx.saved_tensors
        g = grads[0][:, None]
        gradient = probabilities * -g
        if gradient.shape[1]:
            gradient.scatter_add_(1, column[:, None], torch.where(mine[:, None], g, 0))
        return gradient, None, None
