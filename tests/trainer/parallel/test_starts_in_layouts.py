"""What starts from the base starts, trains and freezes the same in any layout; each module is computed once."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
import torch

from allele.format import AdapterShape
from allele_trainer.bank.shard import Shard
from allele_trainer.initialisation import rows
from allele_trainer.model.build import build
from allele_trainer.parallel import Layout
from tests.trainer.parallel.launch import launch
from tests.trainer.parallel.start_rank import SPECS, trained
from tests.trainer.random_base import write_base

EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
LAYOUTS = {
    "tp2": ("qwen3", Layout(tp=2, sequence_parallel=True)),
    "pp2": ("qwen3", Layout(pp=2)),
    "ep2": ("qwen3_moe", Layout(dp=2, ep=2)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("bases")
    sizes: dict[str, dict[str, Any]] = {"qwen3": {}, "qwen3_moe": EXPERTS}
    return {model: write_base(folder / model, model=model, **more) for model, more in sizes.items()}


@pytest.fixture(scope="module")
def alone(
    bases: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Base → its config, and what one process makes of the members."""
    found = {}
    for name, base in bases.items():
        model = build(base)
        found[name] = dict(model.config.raw), trained(model, base, tmp_path_factory.mktemp(name))
    return found


@pytest.fixture(scope="module")
def together(bases: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Layout → what each of its two ranks made of them."""
    folder = tmp_path_factory.mktemp("layouts")
    jobs = []
    for name, (model, layout) in LAYOUTS.items():
        (folder / name).mkdir()
        jobs.append({"layout": dataclasses.asdict(layout), "base": str(bases[model]), "out": str(folder / name)})
    launch("tests.trainer.parallel.start_rank", [json.dumps(jobs)], processes=2, out=folder)
    return {name: [torch.load(folder / name / f"{rank}.pt") for rank in range(2)] for name in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_start_and_train_as_one(
    alone: dict[str, tuple[dict[str, Any], dict[str, Any]]], together: dict[str, list[Any]], name: str
) -> None:
    model, layout = LAYOUTS[name]
    config, expected = alone[model]
    assert sum(found["computed"] for found in together[name]) == expected["computed"] > 0
    for member, spec in SPECS.items():
        shape = AdapterShape.from_model(config, rank=spec.stored_rank, targets=spec.targets)
        whole = {}
        for when in ("first", "last"):
            row = torch.full((shape.numel,), torch.nan)
            for rank, found in enumerate(together[name]):
                Shard(shape, layout.place(rank)).put(found[when][member], row)
            whole[when] = row
        assert torch.equal(whole["first"], expected["first"][member])
        torch.testing.assert_close(whole["last"], expected["last"][member], rtol=0, atol=2e-4)
        mask = rows.trained(shape, spec.init)
        assert mask is not None
        assert torch.equal(whole["last"][mask == 0], whole["first"][mask == 0])
        for step, norms in enumerate(expected["norms"]):
            for found in together[name]:
                assert found["norms"][step][member] == pytest.approx(norms[member], rel=1e-3)
