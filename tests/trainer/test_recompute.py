"""The plan travels with its micro-batch: layers that run again later still route to their own adapters."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from allele.format import AdapterShape
from allele_trainer.bank.rows import Bank
from allele_trainer.bank.start import fresh
from allele_trainer.lora.plan import plan
from allele_trainer.model.batch import to_device
from allele_trainer.model.build import BaseModel, build
from allele_trainer.rl.packing import Sample, pack
from tests.trainer.trainer_parts import adapter, write_base


@pytest.fixture
def recomputing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BaseModel]:
    """A model of its own that recomputes every layer in its backward; Megatron's random states stand on CUDA alone."""
    monkeypatch.setattr(megatron_random, "_get_cuda_rng_state", lambda *_a, **_k: torch.get_rng_state())
    monkeypatch.setattr(megatron_random, "_set_cuda_rng_state", lambda *_a, **_k: None)
    model = build(write_base(tmp_path / "base"))
    config = model.gpt.config
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    yield model


def test_backwards_after_all_forwards_give_the_gradients_of_the_plain_model(
    model: BaseModel, recomputing: BaseModel
) -> None:
    spec = adapter()
    shape = AdapterShape.from_model(model.config.raw, rank=spec.rank, targets=spec.targets)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape.numel, generator=generator) * 0.05 for _ in range(3)]
    batches = [[Sample(0, [1, 2, 3], [4, 5])], [Sample(1, [6], [7, 8, 9]), Sample(2, [10, 11], [12])]]
    gradients = []
    for each in (model, recomputing):
        bank = Bank(shape, slots=3, probes=1, device=each.device)
        for slot, row in enumerate(weights):
            bank.store(slot, fresh(row), scale=2.0)
        each.gpt.train()
        losses = []
        for samples in batches:
            packed = pack(samples)
            routing = plan(bank, packed.counts, padded=packed.tokens.size)
            batch = to_device(packed, plan=routing, device=each.device)
            losses.append(each.logprobs(batch, torch.as_tensor(packed.targets)).sum())
        for loss in losses:  # the first micro-batch runs again after the second set its routing
            loss.backward()
        gradients.append(torch.stack([bank.gradient(s) for s in range(3)]))
    assert gradients[0].abs().amax(1).min() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
