"""What a member's tokens add up to over micro-batches and ranks, and the report made of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from allele.protocol.losses import DistillationLoss, LossSpec, MemberLoss, PolicyLoss, PreferenceLoss
from allele_trainer.rl.losses import Terms, Tokens


@dataclasses.dataclass
class Sums:
    """Over a member's tokens so far; `gap` is a maximum. NaN stays NaN."""

    tokens: int = 0
    loss: float = 0.0
    entropy: float = 0.0
    ratio: float = 0.0
    clipped: float = 0.0
    rejected: float = 0.0
    kl: float = 0.0
    ranked: float = 0.0
    """Weighted as the loss."""
    gap: float = 0.0

    def add(self, other: Sums) -> None:
        self.tokens += other.tokens
        self.loss += other.loss
        self.entropy += other.entropy
        self.ratio += other.ratio
        self.clipped += other.clipped
        self.rejected += other.rejected
        self.kl += other.kl
        self.ranked += other.ranked
        self.gap = float(np.maximum(self.gap, other.gap))

    def report(self, loss: LossSpec) -> MemberLoss:
        """What the member's loss can tell."""
        n = self.tokens
        policy = isinstance(loss, PolicyLoss)
        with_kl = isinstance(loss, DistillationLoss) or (isinstance(loss, PolicyLoss) and loss.kl is not None)
        corrected = isinstance(loss, PolicyLoss) and loss.correction is not None
        return MemberLoss(
            tokens=n,
            loss=self.loss,
            entropy=self.entropy / n,
            ratio_mean=self.ratio / n if policy else None,
            clip_fraction=self.clipped / n if policy else None,
            logprob_gap=self.gap if policy else None,
            rejected_fraction=self.rejected / n if corrected else None,
            kl=self.kl / n if with_kl else None,
            accuracy=self.ranked if isinstance(loss, PreferenceLoss) else None,
        )


@dataclasses.dataclass(frozen=True)
class Columns:
    """Of n tokens, `[n]` each: loss times weight, weight, entropy of the prediction."""

    loss: Tensor
    weight: Tensor
    entropy: Tensor


def sums_of(
    tokens: Tokens, terms: Terms, columns: Columns, *, owners: Sequence[int], lengths: Sequence[int]
) -> dict[int, Sums]:
    """By owner. `owners`, `lengths`: of the tokens' sequences, those of an owner side by side."""
    counts: dict[int, int] = {}
    for owner, length in zip(owners, lengths, strict=True):
        counts[owner] = counts.get(owner, 0) + length
    first = [0, *itertools.accumulate(counts.values())][:-1]
    gap = None if tokens.rollout is None else (tokens.logprobs.detach() - tokens.rollout).abs()
    ranked = None if terms.ranked is None else terms.ranked * columns.weight
    found = {
        "loss": columns.loss,
        "entropy": columns.entropy,
        "ratio": terms.ratio,
        "clipped": terms.clipped,
        "rejected": terms.rejected,
        "kl": terms.kl,
        "ranked": ranked,
        "gap": gap,
    }
    there = {name: values.detach().float() for name, values in found.items() if values is not None}
    table = torch.stack(list(there.values())).cpu().numpy()  # one copy from the device
    totals = {
        name: (np.maximum if name == "gap" else np.add).reduceat(row, first, dtype=np.float64).tolist()
        for name, row in zip(there, table, strict=True)
    }
    rows = zip(*totals.values(), strict=True)
    return {
        owner: Sums(tokens=n, **dict(zip(totals, row, strict=True)))
        for (owner, n), row in zip(counts.items(), rows, strict=True)
    }
