"""Losses that ask the base, compare sequences or learn from a teacher are the same under every layout."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch

from allele.format import AdapterShape
from allele_trainer.bank.shard import Shard
from allele_trainer.model.build import build
from allele_trainer.parallel import Layout
from tests.trainer.parallel import cohort
from tests.trainer.parallel.company_rank import gradients
from tests.trainer.parallel.launch import launch
from tests.trainer.random_base import write_base
from tests.trainer.test_losses_in_company import MEMBERS

LAYOUTS = (
    ("qwen3", Layout(tp=2)),
    ("qwen3", Layout(tp=2, sequence_parallel=True, recompute=True)),
    ("qwen3", Layout(pp=2)),
    ("qwen3", Layout(dp=2)),
    ("qwen3_moe", Layout(ep=2, dp=2)),
)


@pytest.mark.slow
def test_gradients_of_every_loss_are_those_of_one_process(tmp_path: pathlib.Path) -> None:
    bases = {m: write_base(tmp_path / m, model=m, **cohort.SIZES[m]) for m in cohort.SIZES}
    expected = {}
    for model, base in bases.items():
        built = build(base)
        shape = AdapterShape.from_model(built.config.raw, rank=4, targets=cohort.SPECS["all"].targets)
        expected[model] = (shape, *gradients(built))
    jobs = [[str(bases[model]), dataclasses.asdict(layout)] for model, layout in LAYOUTS]
    launch("tests.trainer.parallel.company_rank", [json.dumps(jobs), str(tmp_path)], processes=2, out=tmp_path)
    for number, (model, layout) in enumerate(LAYOUTS):
        shape, gradient, losses = expected[model]
        assert (gradient.norm(dim=1) > 1e-4).all()
        whole = torch.full_like(gradient, torch.nan)
        for rank in range(2):
            found = torch.load(tmp_path / f"{number}-{rank}.pt")
            for mine, row in zip(found["gradient"], whole, strict=True):
                Shard(shape, layout.place(rank)).put(mine, row)
            assert found["losses"] == pytest.approx(losses, rel=1e-4, abs=1e-6), layout
        for member, mine, theirs in zip(MEMBERS, whole, gradient, strict=True):
            assert (mine - theirs).norm() < 1e-4 * theirs.norm(), f"{member}: {layout}"
