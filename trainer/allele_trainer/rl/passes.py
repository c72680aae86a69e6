"""Forward and backward over banks: the only place where model, plan and loss meet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from allele_trainer.bank.banks import Banks
from allele_trainer.lora.plan import plan
from allele_trainer.model.batch import Carried, PackedBatch, to_device
from allele_trainer.model.build import BaseModel
from allele_trainer.model.distribution import Distribution
from allele_trainer.parallel import Ranks
from allele_trainer.rl.objective import objective
from allele_trainer.rl.packing import Packed, Sample, micro_batches, pack, together
from allele_trainer.rl.references import asks, with_base
from allele_trainer.rl.sums import Sums

_IN_FLIGHT = 2
"""Parts of a micro-batch per stage of a pipeline: a stage idles (pp − 1) / (parts + pp − 1) of the time."""


def train(model: BaseModel, banks: Banks, micro_batch: Sequence[Sample]) -> dict[int, Sums]:
    """Add the samples' gradients to the gradient rows of their owners; gives each owner's sums.

    Samples in ascending order of owner, each with a goal; all ranks call it with all of them, data ranks compute a
    share each.
    """
    sums: dict[int, Sums] = {}

    def scalar(packed: Packed, batch: PackedBatch, found: Distribution) -> Tensor:
        value, some = objective(packed, batch.targets, found)
        for owner, more in some.items():
            sums.setdefault(owner, Sums()).add(more)
        return value

    def prepare(packed: Packed) -> PackedBatch:
        return _on_device(model, banks, packed, gradients=True)

    parts = _share(micro_batch, model.ranks)
    if any(asks(s) for s in micro_batch):
        parts = with_base(model, parts)
    model.run([pack(part) for part in parts], prepare=prepare, loss=scalar, backward=True)
    for owner in {s.owner for part in parts for s in part if s.goal is not None and not s.goal.finite}:
        bank, slot = banks.slot(owner)
        bank.spoil(slot)
    return _of_all_ranks(model, sums)


def _share(samples: Sequence[Sample], ranks: Ranks) -> Sequence[Sequence[Sample]]:
    """What this data rank computes of a micro-batch: for a pipeline in parts that keep its stages busy.

    Ranks that exchange tokens for experts go through the same number of parts, empty ones where need be.
    """
    layout = ranks.layout
    shares: list[list[Sequence[Sample]]] = []
    for rank in range(layout.dp):
        mine = [s for whole in together(samples)[rank :: layout.dp] for s in whole]
        tokens = -(-sum(s.inputs for s in mine) // (_IN_FLIGHT * layout.pp))
        shares.append([mine] if layout.pp == 1 else list(micro_batches(mine, max_tokens=tokens)))
    parts = shares[ranks.data_rank]
    if layout.ep > 1:
        return parts + [()] * (max(map(len, shares)) - len(parts))
    return [p for p in parts if p]


def logprobs(
    model: BaseModel, banks: Banks | None, samples: Sequence[Sample], *, max_tokens: int
) -> dict[int, list[float]]:
    """Log-probabilities of each owner's completion tokens, in the order of its samples; all ranks compute all.

    Without banks they are the base's, and owners are any numbers.
    """
    result: dict[int, list[float]] = {}

    def keep(packed: Packed, batch: PackedBatch, found: Distribution) -> Tensor:
        values = found.at(batch.targets)
        for owner, value in zip(packed.owners.tolist(), values.tolist(), strict=True):
            result.setdefault(owner, []).append(value)
        return values.sum()

    def prepare(item: Packed) -> PackedBatch:
        if banks is None:
            return to_device(item, plan=None, device=model.device)
        return _on_device(model, banks, item, gradients=False)

    batches = [pack(b) for b in micro_batches(samples, max_tokens=max_tokens)]
    model.run(batches, prepare=prepare, loss=keep, backward=False)
    if model.ranks.layout.pp == 1:
        return result
    last: dict[str, list[float]] = json.loads(model.ranks.gather(json.dumps(result).encode())[-1])
    return {int(owner): values for owner, values in last.items()}


def _of_all_ranks(model: BaseModel, sums: dict[int, Sums]) -> dict[int, Sums]:
    """Sums of the data ranks added up; one rank of each last stage speaks for its pipeline."""
    ranks = model.ranks
    if ranks.size == 1:
        return sums
    speaks = model.last_stage and ranks.place.tp_rank == 0
    mine = {owner: dataclasses.astuple(s) for owner, s in sums.items()} if speaks else {}
    total: dict[int, Sums] = {}
    for data in ranks.gather(json.dumps(mine).encode()):
        for owner, values in json.loads(data).items():
            total.setdefault(int(owner), Sums()).add(Sums(*values))
    return total


def _on_device(model: BaseModel, banks: Banks, packed: Packed, *, gradients: bool) -> PackedBatch:
    ranks, size = model.ranks, packed.tokens.size
    chunk = (ranks.place.tp_rank, ranks.place.tp) if ranks.sequence_parallel else (0, 1)
    routes = plan(banks, packed.counts, padded=size, gradients=gradients, chunk=chunk) if packed.counts else None
    carried = None
    if model.config.experts:
        owners = np.full(size, -1)
        known, tokens = np.array(packed.counts, np.int64).reshape(-1, 2).T
        owners[: tokens.sum()] = np.repeat(known, tokens)
        carried = Carried(banks, torch.as_tensor(owners).to(model.device), gradients)
    return to_device(packed, plan=routes, device=model.device, carried=carried)
