"""A member's bits do not depend on its slot, on who shares its batch, on other runs, or on how many slots there are."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Collection

import numpy as np
import pytest
from pyarrow import feather

from allele_trainer.model.build import BaseModel, build
from tests.trainer.random_base import write_base
from tests.trainer.trainer_parts import Example, Rig, adapter, examples, same_rows, start

STEPS = 4


def trained(rig: Rig, steps: list[list[Example]], *, wave: int = 1 << 20) -> Rig:
    members = list(dict.fromkeys(e.member for found in steps for e in found))
    rig.reset([start(m, adapter(), seed=int(m[1:])) for m in members])
    for found in steps:
        rig.step(found, rate=5e-3, wave=wave)
    return rig


def counted(model: BaseModel, passes: list[int]) -> BaseModel:
    """The model, which notes the tokens of every forward."""
    noted = dataclasses.replace(model)
    forward = noted._forward
    object.__setattr__(noted, "_forward", lambda batch: (passes.append(batch.tokens.numel()), forward(batch))[1])
    return noted


@pytest.mark.parametrize("each", [1, 7])
@pytest.mark.parametrize("max_tokens", [70, 8192])
def test_alone_and_in_company(rig: Callable[..., Rig], each: int, max_tokens: int) -> None:
    members = [f"m{i}" for i in range(9)]
    steps = [examples(members, each=each, vocab=96, seed=s) for s in range(STEPS)]
    together = trained(rig(slots=9, max_tokens=max_tokens), steps)
    for member in members:
        alone = trained(rig(slots=1, max_tokens=max_tokens), [[e for e in f if e.member == member] for f in steps])
        assert same_rows(alone.row(member), together.row(member)), member


def test_alone_and_in_company_with_long_and_short_sequences(rig: Callable[..., Rig]) -> None:
    steps = []
    for s in range(STEPS):
        found = examples(["m0", "m1", "m2"], each=3, vocab=96, seed=s)
        long = [dataclasses.replace(e, prompt=e.prompt * 12) for e in found if e.member == "m2"]
        steps.append([e for e in found if e.member != "m2"] + long)
    together = trained(rig(slots=3), steps)
    for member in ("m0", "m1", "m2"):
        alone = trained(rig(slots=3), [[e for e in f if e.member == member] for f in steps])
        assert same_rows(alone.row(member), together.row(member)), member


def test_alone_and_in_company_with_sizes_that_align_badly(tmp_path: pathlib.Path) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 56, "head_dim": 12, "vocab_size": 53}
    model = build(write_base(tmp_path / "base", **sizes))
    spec = adapter(rank=1, alpha=2)
    steps = [examples(["m0", "m1", "m2"], each=3, vocab=53, seed=s) for s in range(STEPS)]
    rigs = {}
    for company in (("m0", "m1", "m2"), ("m0",), ("m1",), ("m2",)):
        rigs[company] = mine = Rig(model, tmp_path / "store", slots=3)
        mine.reset([start(m, spec, seed=int(m[1:])) for m in company])
        for found in steps:
            mine.step([e for e in found if e.member in company], rate=5e-3)
    for member in ("m0", "m1", "m2"):
        assert same_rows(rigs["m0", "m1", "m2"].row(member), rigs[(member,)].row(member)), member


def test_alone_and_among_other_shapes_in_one_pass(model: BaseModel, tmp_path: pathlib.Path) -> None:
    """Ranks and targets differ: a micro-batch of several banks is one pass of the model."""
    specs = {
        "m0": adapter(rank=8, alpha=16),
        "m1": adapter(rank=4, alpha=8, targets=("q_proj", "v_proj")),
        "m2": adapter(rank=1, alpha=2, targets=("k_proj", "down_proj")),
        "m3": adapter(rank=8, alpha=4),
        "m4": adapter(rank=16, alpha=8, targets=("up_proj",)),
    }
    steps = [examples(specs, each=3, vocab=96, seed=s) for s in range(STEPS)]
    passes: list[int] = []

    def trained(company: Collection[str]) -> Rig:
        mine = Rig(counted(model, passes), tmp_path / "store", slots=3)
        mine.reset([start(m, specs[m], seed=int(m[1:])) for m in company])
        for found in steps:
            mine.step([e for e in found if e.member in company], rate=5e-3)
        return mine

    together = trained(specs)
    assert len(passes) == STEPS
    for member in specs:
        assert same_rows(trained({member}).row(member), together.row(member)), member


@pytest.mark.parametrize("tokens", range(1, 10))
def test_alone_with_few_tokens_and_among_any_number_in_any_order(rig: Callable[..., Rig], tokens: int) -> None:
    """Solo batches of 1 to 9 tokens: kernels for few rows would give other bits. One of the others is not finite."""
    mine = [Example("m0", [7], [3 + s, *range(1, tokens)], [-2.0] * tokens, 0.5 - s) for s in range(2)]
    alone = trained(rig(slots=1), [[e] for e in mine])
    for number, others in enumerate((1, 4, 16)):
        rng = np.random.default_rng([tokens, number])
        names = [f"m{i + 1}" for i in range(others)]
        steps = []
        for s, own in enumerate(mine):
            found = [*examples(names, each=2, vocab=96, seed=s), own]
            found[0] = dataclasses.replace(found[0], advantage=math.nan)
            steps.append([found[i] for i in rng.permutation(len(found))])
        together = trained(rig(slots=others + 1), steps)
        assert same_rows(alone.row("m0"), together.row("m0")), others
        assert together.row("m1").step == 0 and alone.row("m0").step == 2


def test_64_members_over_16_slots_equal_64_slots(example_model: BaseModel, tmp_path: pathlib.Path) -> None:
    members = [f"m{i}" for i in range(64)]
    steps = [examples(members, each=4, vocab=48, seed=s) for s in range(3)]
    all_in = trained(Rig(example_model, tmp_path, slots=64), steps)
    in_waves = trained(Rig(example_model, tmp_path, slots=16), steps, wave=16)
    assert all(same_rows(all_in.row(m), in_waves.row(m)) for m in members)


def test_recorded_rollouts_give_the_same_digests_over_16_slots_and_over_64(
    example_model: BaseModel, tmp_path: pathlib.Path
) -> None:
    """What an engine really answered (recorded/record.py), trained, exported and hashed."""
    table = feather.read_table(pathlib.Path(__file__).parent / "recorded/rollouts.feather").to_pylist()
    steps = [[Example(**{k: v for k, v in r.items() if k != "step"}) for r in table if r["step"] == s] for s in (0, 1)]
    members = list(dict.fromkeys(e.member for found in steps for e in found))
    assert len(members) == 64
    digests = {}
    for slots in (64, 16):
        rig = trained(Rig(example_model, tmp_path / str(slots), slots=slots), steps, wave=slots)
        digests[slots] = {m: r.digest for m, r in rig.export(*members).weights.items()}
    assert digests[16] == digests[64]
    assert len(set(digests[64].values())) == 64


def test_two_runs_that_take_each_others_slots_between_gradient_and_step(rig: Callable[..., Rig]) -> None:
    found = {run: examples([f"m{i}" for i in range(3)], each=3, vocab=96, seed=s) for s, run in enumerate("xy")}
    shared, rates = rig(slots=3), dict.fromkeys(("m0", "m1", "m2"), 5e-3)
    for run in "xy":
        shared.reset([start(m, adapter(), seed=i) for i, m in enumerate(rates)], run=run)
    for _ in range(3):
        for run in "xy":
            shared.admit(*rates, run=run)
        for run in "xy":
            shared.forward_backward(found[run], run=run)
        for run in "yx":
            shared.optim_step(rates, run=run)
    for run in "xy":
        alone = trained(rig(slots=3), [found[run]] * 3)
        assert all(same_rows(shared.row(m, run=run), alone.row(m)) for m in rates)


def test_batched_and_one_by_one(rig: Callable[..., Rig]) -> None:
    members = [f"m{i}" for i in range(5)]
    steps = [examples(members, each=4, vocab=96, seed=s) for s in range(STEPS)]
    rigs = {}
    for mode in ("Batched", "OneByOne"):
        rigs[mode] = mine = rig(slots=5, max_tokens=70)
        mine.reset([start(m, adapter(), seed=int(m[1:])) for m in members])
        mine.admit(*members)
        for found in steps:
            mine.forward_backward(found, mode=mode)  # type: ignore[arg-type]
            mine.optim_step(dict.fromkeys(members, 5e-3))
    assert all(same_rows(rigs["Batched"].row(m), rigs["OneByOne"].row(m)) for m in members)
