"""Forward and backward over one bank: the only place where model, plan and loss meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from allele.protocol.commands import LossSpec, MemberLoss
from allele_trainer.bank.rows import Bank
from allele_trainer.lora.plan import plan
from allele_trainer.model.batch import PackedBatch, to_device
from allele_trainer.model.build import BaseModel
from allele_trainer.rl.losses import LOSSES, TokenLoss
from allele_trainer.rl.packing import Packed, Sample, micro_batches, pack


@dataclasses.dataclass
class Sums:
    """Of a member's tokens so far."""

    tokens: int = 0
    loss: float = 0.0
    ratio: float = 0.0
    clipped: float = 0.0
    gap: float = 0.0

    def add(self, other: Sums) -> None:
        self.tokens += other.tokens
        self.loss, self.ratio, self.clipped = (
            self.loss + other.loss,
            self.ratio + other.ratio,
            self.clipped + other.clipped,
        )
        self.gap = float(np.maximum(self.gap, other.gap))

    def report(self) -> MemberLoss:
        n = self.tokens
        return MemberLoss(
            tokens=n, loss=self.loss, ratio_mean=self.ratio / n, clip_fraction=self.clipped / n, logprob_gap=self.gap
        )


def train(
    model: BaseModel, bank: Bank, micro_batch: Sequence[Sample], *, loss: LossSpec, weights: Mapping[int, float]
) -> dict[int, Sums]:
    """Add the samples' gradients to the gradient rows of their slots; gives each slot's sums.

    `weights`: what a token of each slot counts in its member's loss. Samples in ascending order of slot.
    """
    packed = pack(micro_batch)
    batch = _on_device(model, bank, packed, gradients=True)
    old, advantages = (torch.as_tensor(a).to(model.device) for a in (packed.logprobs, packed.advantages))
    found = model.logprobs(batch, torch.as_tensor(packed.targets).to(model.device))
    token = LOSSES[loss.kind](found, old, advantages, loss)
    weight = torch.tensor([weights[s] for s in packed.owners.tolist()], device=model.device)
    (token.loss * weight).sum().backward()
    for slot in _spoiled(packed):
        bank.spoil(slot)
    return _sums(packed, token, weight=weight, gap=(found.detach() - old).abs())


def logprobs(model: BaseModel, bank: Bank, samples: Sequence[Sample], *, max_tokens: int) -> dict[int, list[float]]:
    """Log-probabilities of each slot's completion tokens, in the order of its samples."""
    result: dict[int, list[float]] = {}
    with torch.no_grad():
        for micro_batch in micro_batches(samples, max_tokens=max_tokens):
            packed = pack(micro_batch)
            batch = _on_device(model, bank, packed, gradients=False)
            values = model.logprobs(batch, torch.as_tensor(packed.targets).to(model.device))
            for slot, value in zip(packed.owners.tolist(), values.tolist(), strict=True):
                result.setdefault(slot, []).append(value)
    return result


def _spoiled(packed: Packed) -> list[int]:
    """Slots with an input that is not finite: some of these (a logprob of ∞) would give a finite gradient."""
    finite = np.isfinite(packed.logprobs) & np.isfinite(packed.advantages)
    found: list[int] = np.unique(packed.owners[~finite]).tolist()
    return found


def _on_device(model: BaseModel, bank: Bank, packed: Packed, *, gradients: bool) -> PackedBatch:
    routes = plan(bank, packed.counts, padded=packed.tokens.size, gradients=gradients)
    return to_device(packed, plan=routes, device=model.device)


def _sums(packed: Packed, token: TokenLoss, *, weight: Tensor, gap: Tensor) -> dict[int, Sums]:
    """Of each slot's tokens, which lie side by side; NaN stays NaN."""
    first = np.flatnonzero(np.diff(packed.owners, prepend=-1))
    loss, ratio, clipped, gaps = (
        t.detach().double().cpu().numpy() for t in (token.loss * weight, token.ratio, token.clipped, gap)
    )
    totals = [np.add.reduceat(v, first) for v in (np.ones_like(loss), loss, ratio, clipped)]
    peaks = np.maximum.reduceat(gaps, first)
    return {
        slot: Sums(int(n), float(a), float(b), float(c), float(peak))
        for slot, n, a, b, c, peak in zip(packed.owners[first].tolist(), *totals, peaks, strict=True)
    }
