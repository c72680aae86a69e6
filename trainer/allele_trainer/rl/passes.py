"""Forward and backward over one bank: the only place where model, plan and loss meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from allele.protocol.commands import LossSpec, MemberLoss
from allele_trainer.bank.rows import Bank
from allele_trainer.lora.plan import plan
from allele_trainer.model.batch import PackedBatch, to_device
from allele_trainer.model.build import BaseModel
from allele_trainer.rl.losses import LOSSES, TokenLoss
from allele_trainer.rl.packing import Packed, Sample, micro_batches, pack, token_weights


@dataclasses.dataclass
class _Sums:
    tokens: int = 0
    loss: float = 0.0
    ratio: float = 0.0
    clipped: float = 0.0
    gap: float = 0.0

    def report(self) -> MemberLoss:
        n = self.tokens
        return MemberLoss(
            tokens=n, loss=self.loss, ratio_mean=self.ratio / n, clip_fraction=self.clipped / n, logprob_gap=self.gap
        )


def train(
    model: BaseModel, bank: Bank, samples: Sequence[Sample], *, loss: LossSpec, max_tokens: int
) -> dict[int, MemberLoss]:
    """Add the samples' gradients to the rows of their slots; gives each slot's loss.

    The loss of a token counts 1 / (completion tokens of its slot in `samples`).
    """
    weights = token_weights(samples)
    sums = {slot: _Sums() for slot in weights}
    for micro_batch in micro_batches(samples, max_tokens=max_tokens):
        packed = pack(micro_batch)
        batch = _on_device(model, bank, packed, gradients=True)
        old, advantages = (torch.as_tensor(a).to(model.device) for a in (packed.logprobs, packed.advantages))
        logprobs = model.logprobs(batch, torch.as_tensor(packed.targets).to(model.device))
        token = LOSSES[loss.kind](logprobs, old, advantages, loss)
        weight = torch.tensor([weights[s] for s in packed.owners.tolist()], device=model.device)
        (token.loss * weight).sum().backward()
        for slot in _spoiled(packed):
            bank.spoil(slot)
        _add(sums, packed, token, weight=weight, gap=(logprobs.detach() - old).abs())
    return {slot: s.report() for slot, s in sums.items()}


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


def _add(sums: dict[int, _Sums], packed: Packed, token: TokenLoss, *, weight: Tensor, gap: Tensor) -> None:
    """Sums of each slot's tokens, which lie side by side; NaN stays NaN."""
    first = np.flatnonzero(np.diff(packed.owners, prepend=-1))
    loss, ratio, clipped, gaps = (
        t.detach().double().cpu().numpy() for t in (token.loss * weight, token.ratio, token.clipped, gap)
    )
    totals = [np.add.reduceat(v, first) for v in (np.ones_like(loss), loss, ratio, clipped)]
    peaks = np.maximum.reduceat(gaps, first)
    for slot, n, a, b, c, peak in zip(packed.owners[first].tolist(), *totals, peaks, strict=True):
        s = sums[slot]
        s.tokens += int(n)
        s.loss, s.ratio, s.clipped = s.loss + float(a), s.ratio + float(b), s.clipped + float(c)
        s.gap = float(np.maximum(s.gap, peak))
