"""The plan travels with its micro-batch: layers that run again later still route to their own adapters."""

from __future__ import annotations

import pathlib

import torch

from allele.format import AdapterShape
from allele_trainer.bank.banks import Banks
from allele_trainer.bank.rows import Bank
from allele_trainer.bank.shard import Shard
from allele_trainer.bank.start import fresh
from allele_trainer.lora.plan import plan
from allele_trainer.model.batch import to_device
from allele_trainer.model.build import BaseModel, build
from allele_trainer.parallel import Layout, initialise
from allele_trainer.rl.packing import Sample, pack
from tests.trainer.trainer_parts import adapter


def test_backwards_after_all_forwards_give_the_gradients_of_the_plain_model(
    model: BaseModel, base: pathlib.Path
) -> None:
    recomputing = build(base, initialise(Layout(recompute=True)))
    spec = adapter()
    shape = AdapterShape.from_model(model.config.raw, rank=spec.rank, targets=spec.targets)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape.numel, generator=generator) * 0.05 for _ in range(3)]
    batches = [[Sample(0, [1, 2, 3], [4, 5])], [Sample(1, [6], [7, 8, 9]), Sample(2, [10, 11], [12])]]
    gradients = []
    for each in (model, recomputing):
        bank = Bank(Shard(shape), slots=3, probes=1, device=each.device)
        for slot, row in enumerate(weights):
            bank.store(slot, fresh(row), scale=2.0)
        losses = []
        for samples in batches:
            packed = pack(samples)
            routing = plan(Banks([bank]), packed.counts, padded=packed.tokens.size, gradients=True)
            batch = to_device(packed, plan=routing, device=each.device)
            losses.append(each.logprobs(batch, torch.as_tensor(packed.targets)).sum())
        for loss in losses:  # the first micro-batch runs again after the second set its routing
            loss.backward()
        gradients.append(torch.stack([bank.gradient(s) for s in range(3)]))
    assert gradients[0].abs().amax(1).min() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
