"""Every layout trains what Hugging Face, PEFT and torch's AdamW train: gradients, norms and five steps of every member.

Members have ranks, targets and rules of their own; batches are ragged and several per step. What a rank holds is put
together with `Shard`, which knows nothing of how the model split its work.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from allele_trainer.bank.shard import Shard
from allele_trainer.parallel import Layout
from tests.trainer.parallel import cohort
from tests.trainer.parallel.launch import launch
from tests.trainer.random_base import write_base
from tests.trainer.twin import PeftTwin

LAYOUTS = {
    "tp2": ("qwen3", Layout(tp=2)),
    "tp2 with sequence parallelism": ("qwen3", Layout(tp=2, sequence_parallel=True)),
    "pp2 with recompute": ("qwen3", Layout(pp=2, recompute=True)),
    "dp2": ("qwen3", Layout(dp=2)),
    "tp2 × pp2": ("qwen3", Layout(tp=2, pp=2, sequence_parallel=True, recompute=True)),
    "ep2": ("qwen3_moe", Layout(dp=2, ep=2, recompute=True)),
    "experts over tensor ranks": ("qwen3_moe", Layout(tp=2, ep=2, sequence_parallel=True)),
    "every expert on both tensor ranks": ("qwen3_moe", Layout(tp=2, sequence_parallel=True)),
    "experts on a pipeline": ("qwen3_moe", Layout(pp=2)),
}

RESUMED = {
    "tp2 from itself": ("tp2 with sequence parallelism", "tp2 with sequence parallelism"),
    "pp2 from itself": ("pp2 with recompute", "pp2 with recompute"),
    "ep2 from itself": ("ep2", "ep2"),
    "dp2 from tp2": ("dp2", "tp2 with sequence parallelism"),
    "tp2 from pp2": ("tp2", "pp2 with recompute"),
    "experts over tensor ranks from ep2": ("experts over tensor ranks", "ep2"),
    "ep2 from a pipeline": ("ep2", "experts on a pipeline"),
}
"""Layout that goes on, and the one that saved."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """Of one member, from code that shares nothing with ours."""

    first: torch.Tensor
    weights: torch.Tensor
    norms: list[float]
    logprobs: list[float]


@dataclasses.dataclass(frozen=True)
class Found:
    """Of one member: parts of its whole row (`first`: exp_avg after one step), and what each rank was told."""

    parts: dict[str, torch.Tensor]
    norms: list[list[float]]
    logprobs: list[list[float]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {model: write_base(folder / model, model=model, **sizes) for model, sizes in cohort.SIZES.items()}


@pytest.fixture(scope="module")
def expected(
    bases: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Expected]]:
    """Base → what every member becomes."""
    folder = tmp_path_factory.mktemp("peft")
    return {
        model: {m: _expected(model, base, folder / model / m, m) for m in cohort.SPECS} for model, base in bases.items()
    }


@pytest.fixture(scope="module")
def trained(
    bases: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Found]]:
    """Layout → what became of every member; all layouts of as many processes are run by one group of them."""
    folder = tmp_path_factory.mktemp("layouts")
    started: set[int] = set()

    def of(name: str) -> dict[str, Found]:
        model, layout = LAYOUTS[RESUMED[name][0] if name in RESUMED else name]
        if layout.processes not in started:
            started.add(layout.processes)
            _start(layout.processes, bases, folder)
        return _found(bases[model], layout, folder / name)

    return of


def _expected(model: str, base: pathlib.Path, folder: pathlib.Path, member: str) -> Expected:
    shape = cohort.shape(json.loads((base / "config.json").read_text()), member)
    packed = shape.pack(cohort.first_weights(shape, member))
    twin = PeftTwin(base, shape, packed, cohort.SPECS[member], folder)
    steps = [[e for e in cohort.samples(n, model=model) if e.member == member] for n in range(cohort.STEPS)]
    norms = twin.train(steps, rate=cohort.RATES[member], rule=cohort.RULES[member])
    with torch.no_grad():
        logprobs = torch.cat([twin.logprobs(e.prompt, e.completion, e.experts) for e in steps[0]]).tolist()
    assert twin.first is not None
    return Expected(twin.first, twin.row(), norms, logprobs)


def _start(processes: int, bases: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    """Run every layout of so many processes, then those that go on from one of them."""
    jobs: list[dict[str, Any]] = []
    for name, source in [*((n, None) for n in LAYOUTS), *((n, saved) for n, (_, saved) in RESUMED.items())]:
        model, layout = LAYOUTS[RESUMED[name][0] if source else name]
        if layout.processes != processes:
            continue
        (folder / name).mkdir()
        job = {"layout": dataclasses.asdict(layout), "base": str(bases[model]), "out": str(folder / name)}
        if source:
            job["saved"] = {"layout": dataclasses.asdict(LAYOUTS[source][1]), "out": str(folder / source)}
        jobs.append(job)
    launch("tests.trainer.parallel.rank", [json.dumps(jobs)], processes=processes, out=folder)


def _found(base: pathlib.Path, layout: Layout, out: pathlib.Path) -> dict[str, Found]:
    ranks: list[dict[str, Any]] = [torch.load(out / f"{r}.pt") for r in range(layout.processes)]
    found = {}
    for member in cohort.SPECS:
        shape = cohort.shape(json.loads((base / "config.json").read_text()), member)
        whole = {part: torch.full((shape.numel,), torch.nan) for part in ranks[0]["rows"][member]}
        for number, rank in enumerate(ranks):
            for part, row in whole.items():
                Shard(shape, layout.place(number)).put(rank["rows"][member][part], row)
        told = [r["report"][member]["norms"] for r in ranks]
        found[member] = Found(whole, told, [r["logprobs"][member] for r in ranks])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_five_steps_equal_peft_for_every_member(
    expected: dict[str, dict[str, Expected]], trained: Callable[[str], dict[str, Found]], name: str
) -> None:
    for member, found in trained(name).items():
        wanted = expected[LAYOUTS[name][0]][member]
        scale = wanted.first.abs().max()
        assert (found.parts["first"] - wanted.first).abs().max() < 5e-6 * scale, f"{member}: first gradient"
        for norms in found.norms:
            assert norms == pytest.approx(wanted.norms, rel=2e-5), f"{member}: norms"
        gap = (found.parts["weights"] - wanted.weights).abs()
        # Adam divides a gradient by its own size: where it is almost zero, rounding decides an element's step.
        assert gap.quantile(0.999) < 3e-7, f"{member}: weights differ by {gap.quantile(0.999)}"
        assert gap.max() < cohort.RATES[member], f"{member}: weights differ by {gap.max()}, more than a step"
        for logprobs in found.logprobs:
            assert logprobs == pytest.approx(wanted.logprobs, abs=1e-5), f"{member}: logprobs after five steps"


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_rows_saved_under_one_layout_go_on_under_another(trained: Callable[[str], dict[str, Found]], name: str) -> None:
    layout, source = RESUMED[name]
    gone_on, uninterrupted = trained(name), trained(source)
    for member, found in gone_on.items():
        wanted = uninterrupted[member]
        for part in ("weights", "exp_avg", "exp_avg_sq"):
            if layout == source:
                assert torch.equal(found.parts[part], wanted.parts[part]), f"{member}: {part}"
            else:
                gap = (found.parts[part] - wanted.parts[part]).abs().max()
                assert gap < 1e-6, f"{member}: {part} differs by {gap}"
        for norms in found.norms:
            rest = wanted.norms[0][cohort.SAVED :]
            assert norms == (rest if layout == source else pytest.approx(rest, rel=2e-5))
