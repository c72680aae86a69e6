"""Forward and backward over one bank: the only place where model, plan and loss meet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from allele.protocol.commands import LossSpec, MemberLoss
from allele_trainer.bank.rows import Bank
from allele_trainer.lora.plan import plan
from allele_trainer.model.batch import Carried, PackedBatch, to_device
from allele_trainer.model.build import BaseModel
from allele_trainer.parallel import Ranks
from allele_trainer.rl.losses import LOSSES, TokenLoss
from allele_trainer.rl.packing import Packed, Sample, micro_batches, pack

_IN_FLIGHT = 2
"""Parts of a micro-batch per stage of a pipeline: a stage idles (pp − 1) / (parts + pp − 1) of the time."""


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

    `weights`: what a token of each slot counts in its member's loss. Samples in ascending order of slot; all ranks call
    it with all of them, data ranks compute a share each.
    """
    sums: dict[int, Sums] = {}

    def scalar(packed: Packed, found: Tensor) -> Tensor:
        old, advantages = (torch.as_tensor(a).to(model.device) for a in (packed.logprobs, packed.advantages))
        token = LOSSES[loss.kind](found, old, advantages, loss)
        weight = torch.tensor([weights[s] for s in packed.owners.tolist()], device=model.device)
        weight[torch.as_tensor(packed.unknown)] = 0
        for slot, some in _sums(packed, token, weight=weight, gap=(found.detach() - old).abs()).items():
            sums.setdefault(slot, Sums()).add(some)
        return (token.loss * weight).sum()

    def prepare(packed: Packed) -> PackedBatch:
        return _on_device(model, bank, packed, gradients=True)

    batches = [pack(part) for part in _share(micro_batch, model.ranks)]
    model.run(batches, prepare=prepare, loss=scalar, backward=True)
    for slot in {slot for packed in batches for slot in _spoiled(packed)}:
        bank.spoil(slot)
    return _of_all_ranks(model, sums)


def _share(samples: Sequence[Sample], ranks: Ranks) -> list[Sequence[Sample]]:
    """What this data rank computes of a micro-batch: for a pipeline in parts that keep its stages busy.

    Ranks that exchange tokens for experts go through the same number of parts, empty ones where need be.
    """
    layout = ranks.layout
    shares: list[list[Sequence[Sample]]] = []
    for rank in range(layout.dp):
        mine = samples[rank :: layout.dp]
        tokens = -(-sum(s.inputs for s in mine) // (_IN_FLIGHT * layout.pp))
        shares.append([mine] if layout.pp == 1 else list(micro_batches(mine, max_tokens=tokens)))
    parts = shares[ranks.data_rank]
    if layout.ep > 1:
        return parts + [()] * (max(map(len, shares)) - len(parts))
    return [p for p in parts if p]


def logprobs(model: BaseModel, bank: Bank, samples: Sequence[Sample], *, max_tokens: int) -> dict[int, list[float]]:
    """Log-probabilities of each slot's completion tokens, in the order of its samples; all ranks compute all."""
    result: dict[int, list[float]] = {}

    def keep(packed: Packed, values: Tensor) -> Tensor:
        for slot, value in zip(packed.owners.tolist(), values.tolist(), strict=True):
            result.setdefault(slot, []).append(value)
        return values.sum()

    def prepare(item: Packed) -> PackedBatch:
        return _on_device(model, bank, item, gradients=False)

    batches = [pack(b) for b in micro_batches(samples, max_tokens=max_tokens)]
    model.run(batches, prepare=prepare, loss=keep, backward=False)
    if model.ranks.layout.pp == 1:
        return result
    last: dict[str, list[float]] = json.loads(model.ranks.gather(json.dumps(result).encode())[-1])
    return {int(slot): values for slot, values in last.items()}


def _of_all_ranks(model: BaseModel, sums: dict[int, Sums]) -> dict[int, Sums]:
    """Sums of the data ranks added up; one rank of each last stage speaks for its pipeline."""
    ranks = model.ranks
    if ranks.size == 1:
        return sums
    speaks = model.last_stage and ranks.place.tp_rank == 0
    mine = {slot: dataclasses.astuple(s) for slot, s in sums.items()} if speaks else {}
    total: dict[int, Sums] = {}
    for data in ranks.gather(json.dumps(mine).encode()):
        for slot, values in json.loads(data).items():
            total.setdefault(int(slot), Sums()).add(Sums(*values))
    return total


def _spoiled(packed: Packed) -> list[int]:
    """Slots with an input that is not finite: some of these (a logprob of ∞) would give a finite gradient."""
    finite = np.isfinite(packed.logprobs) & np.isfinite(packed.advantages)
    found: list[int] = np.unique(packed.owners[~finite]).tolist()
    return found


def _on_device(model: BaseModel, bank: Bank, packed: Packed, *, gradients: bool) -> PackedBatch:
    ranks, size = model.ranks, packed.tokens.size
    chunk = (ranks.place.tp_rank, ranks.place.tp) if ranks.sequence_parallel else (0, 1)
    routes = plan(bank, packed.counts, padded=size, gradients=gradients, chunk=chunk) if packed.counts else None
    carried = None
    if model.config.experts:
        owners = torch.full((size,), -1)
        for slot, begin, end in routes.spans if routes else ():
            owners[begin:end] = slot
        carried = Carried((bank,), owners.to(model.device), gradients)
    return to_device(packed, plan=routes, device=model.device, carried=carried)


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
