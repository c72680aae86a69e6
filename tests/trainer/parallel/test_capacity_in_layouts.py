"""Ranks agree on slots: as many as the one with the least room has, and none is left waiting in a step."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from allele_trainer.parallel import Layout
from tests.trainer.parallel.capacity_rank import REFUSED_ABOVE
from tests.trainer.parallel.launch import launch
from tests.trainer.random_base import write_base

LAYOUTS = {"tp2": Layout(tp=2, sequence_parallel=True), "pp2": Layout(pp=2, recompute=True), "dp2": Layout(dp=2)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Layout → what each of its two ranks found."""
    folder = tmp_path_factory.mktemp("layouts")
    base, jobs = write_base(folder / "base"), []
    for name, layout in LAYOUTS.items():
        (folder / name).mkdir()
        jobs.append({"layout": dataclasses.asdict(layout), "base": str(base), "out": str(folder / name)})
    launch("tests.trainer.parallel.capacity_rank", [json.dumps(jobs)], processes=2, out=folder)
    return {name: [json.loads((folder / name / f"{rank}.json").read_text()) for rank in range(2)] for name in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_have_the_slots_of_the_one_with_the_least_room(found: dict[str, list[Any]], name: str) -> None:
    first, second = (rank["free"] for rank in found[name])
    assert first["slots"] == second["slots"] > REFUSED_ABOVE
    assert all("of 100.0 MiB (50% of what was free on one of the ranks)" in r["reason"] for r in (first, second))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_one_rank_cannot_allocate_none_steps(found: dict[str, list[Any]], name: str) -> None:
    first, second = (rank["refused"] for rank in found[name])
    assert first["slots"] == second["slots"] <= REFUSED_ABOVE
    assert first["slots"] >= REFUSED_ABOVE * 7 // 8
