"""A member that starts from the base equals the base, trains as it should, and freezes what it must."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from allele.protocol import commands as c
from allele.protocol.errors import DigestMismatch, InvalidRequest, Unavailable
from allele.protocol.initialisation import InitSpec
from allele.store import StoreUnavailable, bases
from allele.store.factors import FactorStore
from allele.store.objects import Objects
from allele_trainer.initialisation import residual
from allele_trainer.model.build import BaseModel, build
from allele_trainer.rl.packing import Sample
from allele_trainer.rl.passes import logprobs
from tests.trainer.random_base import write_base
from tests.trainer.trainer_parts import Rig, adapter, examples, same_rows, start
from tests.trainer.twin import PeftTwin

CHANGING: list[Any] = ["PiSSA", "MiLoRA", "OLoRA", "OLoRATail"]
PROBES = (c.ProbeSequence(prompt=(5, 6, 7), completion=(8, 9)), c.ProbeSequence(prompt=(40,), completion=(41, 42, 43)))
MICA = adapter(alpha=4, init=InitSpec(kind="MiCA"))
DECAY = c.OptimizerSpec(weight_decay=0.3, clip=0.5)
STEPS = [examples(["a"], each=3, vocab=96, seed=s) for s in range(5)]


def spec(kind: Any, mode: Any, **changes: Any) -> c.AdapterSpec:
    return adapter(**{"alpha": 4} | changes, init=InitSpec(kind=kind, base_mode=mode))


def write_residual(base: pathlib.Path, folder: pathlib.Path, wanted: c.AdapterSpec, **options: Any) -> pathlib.Path:
    digest = bases.digest(base)
    store = FactorStore(Objects.open(f"file://{folder}-store"), digest)
    residual.write(base, folder, digest=digest, spec=wanted, store=store, **options)
    return folder


def of_base(model: BaseModel) -> list[float]:
    """Logprobs of the probes without any adapter."""
    samples = [Sample(i, p.prompt, p.completion) for i, p in enumerate(PROBES)]
    found = logprobs(model, None, samples, max_tokens=512)
    return [value for i in range(len(PROBES)) for value in found[i]]


def exported(mine: Rig, member: str = "a") -> tuple[tuple[float, ...], bytes]:
    done = mine.export(member, probes=PROBES)
    return done.probe_logprobs[member], mine.store.read(done.weights[member])


def parts(mine: Rig, wanted: c.AdapterSpec, row: torch.Tensor) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(v) for n, v in mine.shape(wanted).views(row.contiguous().numpy()).items()}


def frozen(mine: Rig, wanted: c.AdapterSpec) -> torch.Tensor:
    """Written out here: the second half of a Rank2r adapter's ranks, or all of MiCA's B."""
    shape, half = mine.shape(wanted), wanted.rank
    found = torch.zeros(shape.numel, dtype=torch.bool)
    for t in shape.tensors:
        view = found[t.offset : t.offset + t.numel].view(t.shape)
        if wanted.init.kind == "MiCA":
            view[:] = "lora_B" in t.name
        elif "lora_A" in t.name:
            view[half:] = True
        else:
            view[:, half:] = True
    return found


@pytest.mark.parametrize("wanted", [*(spec(k, "Rank2r") for k in CHANGING), MICA], ids=lambda s: s.init.kind)
def test_over_the_untouched_base_a_new_adapter_computes_what_the_base_computes(
    model: BaseModel, rig: Callable[..., Rig], base: pathlib.Path, tmp_path: pathlib.Path, wanted: c.AdapterSpec
) -> None:
    mine = rig(base=base)
    mine.reset([start("a", wanted)])
    mine.admit("a")
    assert mine.row("a").weights.any()
    found, packed = exported(mine)
    assert found == pytest.approx(of_base(model), abs=1e-5)
    twin = PeftTwin(base, mine.shape(wanted), packed, wanted, tmp_path / "peft")
    with torch.no_grad():
        theirs = torch.cat([twin.logprobs(p.prompt, p.completion) for p in PROBES])
    assert theirs.tolist() == pytest.approx(of_base(model), abs=1e-5)


@pytest.mark.parametrize("kind", CHANGING)
def test_over_the_residual_base_a_new_adapter_computes_what_the_base_computes(
    model: BaseModel, base: pathlib.Path, tmp_path: pathlib.Path, kind: Any
) -> None:
    wanted = spec(kind, "SharedResidual", scaling="Fixed", alpha=0.5)
    folder = write_residual(base, tmp_path / "residual", wanted)
    other = build(folder)
    mine = Rig(other, tmp_path / "store", base=folder)
    mine.reset([start("a", wanted)])
    mine.admit("a")
    found, packed = exported(mine)
    assert found == pytest.approx(of_base(model), abs=1e-5)
    assert of_base(other) != pytest.approx(of_base(model), abs=1e-3)
    twin = PeftTwin(folder, mine.shape(wanted), packed, wanted, tmp_path / "peft")
    with torch.no_grad():
        theirs = torch.cat([twin.logprobs(p.prompt, p.completion) for p in PROBES])
    assert theirs.tolist() == pytest.approx(of_base(model), abs=1e-5)


def test_experts_start_each_from_their_own_weights(tmp_path: pathlib.Path) -> None:
    sizes = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    base = write_base(tmp_path / "base", model="qwen3_moe", **sizes)
    model, wanted = build(base), spec("PiSSA", "Rank2r")
    mine = Rig(model, tmp_path / "store", base=base)
    mine.reset([start("a", wanted), start("b", MICA)])
    mine.admit("a", "b")
    for member in "ab":
        assert exported(mine, member)[0] == pytest.approx(of_base(model), abs=1e-5)
    shared = spec("PiSSA", "SharedResidual")
    folder = write_residual(base, tmp_path / "residual", shared)
    other = Rig(build(folder), tmp_path / "store", base=folder)
    other.reset([start("a", shared)])
    other.admit("a")
    assert exported(other)[0] == pytest.approx(of_base(model), abs=1e-5)


@pytest.mark.parametrize(("kind", "scaling"), [("PiSSA", "Standard"), ("OLoRATail", "RankStabilised")])
def test_rank_2r_trains_what_the_residual_base_trains_and_what_peft_does(
    rig: Callable[..., Rig], base: pathlib.Path, tmp_path: pathlib.Path, kind: Any, scaling: str
) -> None:
    doubled, shared = (spec(kind, mode, scaling=scaling, alpha=2) for mode in ("Rank2r", "SharedResidual"))
    folder = write_residual(base, tmp_path / "residual", shared)
    mine, other = rig(base=base), Rig(build(folder), tmp_path / "other", base=folder)
    for r, s in ((mine, doubled), (other, shared)):
        r.reset([start("a", s, optimizer=DECAY)])
        r.admit("a")
    twin = PeftTwin(folder, other.shape(shared), exported(other)[1], shared, tmp_path / "peft")
    digests = [r.export("a").factor_digests["a"] for r in (mine, other)]
    assert digests[0] == digests[1]
    norms = [[r.step(found, rate=1e-3)["a"].grad_norm for found in STEPS] for r in (mine, other)]
    theirs = twin.train(STEPS, rate=1e-3, rule=DECAY)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[1] == pytest.approx(theirs, rel=1e-3)
    torch.testing.assert_close(other.row("a").weights, twin.row(), rtol=0, atol=1e-4)
    one = parts(mine, doubled, mine.row("a").weights)
    for name, tensor in parts(other, shared, other.row("a").weights).items():
        half = one[name][:8] if "lora_A" in name else one[name][:, :8]
        torch.testing.assert_close(half, tensor, rtol=0, atol=1e-4)
    found, packed = exported(mine)
    untouched = PeftTwin(base, mine.shape(doubled), packed, doubled, tmp_path / "doubled")
    with torch.no_grad():
        served = torch.cat([untouched.logprobs(p.prompt, p.completion) for p in PROBES])
    assert served.tolist() == pytest.approx(found, abs=1e-5)
    assert found != pytest.approx(of_base(mine.model), abs=1e-3)


@pytest.mark.parametrize("wanted", [spec("PiSSA", "Rank2r"), MICA], ids=lambda s: s.init.kind)
def test_what_is_frozen_keeps_its_bits_under_decay_and_has_no_moments(
    rig: Callable[..., Rig], base: pathlib.Path, wanted: c.AdapterSpec
) -> None:
    mine = rig(base=base)
    mine.reset([start("a", wanted, optimizer=DECAY)])
    mine.admit("a")
    first, still = mine.row("a").weights.clone(), frozen(mine, wanted)
    for found in STEPS[:3]:
        mine.step(found, rate=1e-2)
    after = mine.row("a")
    assert first[still].any() and torch.equal(after.weights[still], first[still])
    assert not after.exp_avg[still].any() and not after.exp_avg_sq[still].any()
    moved = after.weights[~still] != first[~still]
    assert moved.float().mean() > 0.99
    for name, tensor in parts(mine, wanted, after.weights - first).items():
        assert tensor.any() == (wanted is not MICA or "lora_A" in name)


def test_what_is_frozen_does_not_count_in_the_norm(rig: Callable[..., Rig], base: pathlib.Path) -> None:
    """The same weights in members that freeze and that do not: the norms differ by the gradients of what is frozen."""
    mine = rig(base=base)
    rule = c.OptimizerSpec(clip=1e9)
    for wanted in (spec("PiSSA", "Rank2r"), MICA):
        mine.reset([start("a", wanted)])
        mine.step(STEPS[1], rate=1e-2)  # until A moves, MiCA's B has no gradient
        weights = mine.export("a").weights["a"]
        free = adapter(rank=wanted.stored_rank, alpha=wanted.scale, scaling="Fixed")
        mine.reset([start(m, s, optimizer=rule, weights=weights) for m, s in (("a", wanted), ("b", free))])
        mine.admit("a", "b")
        both = [e.__class__(**(vars(e) | {"member": m})) for m in "ab" for e in STEPS[0]]
        norms = {m: u.grad_norm for m, u in mine.step(both).items()}
        gradient = mine.row("b").exp_avg / 0.1
        still = frozen(mine, wanted)
        assert norms["b"] == pytest.approx(float(gradient.norm()), rel=1e-4)
        assert norms["a"] == pytest.approx(float(gradient[~still].norm()), rel=1e-4)
        assert norms["a"] < 0.999 * norms["b"]


@pytest.mark.parametrize("wanted", [spec("MiLoRA", "Rank2r"), MICA], ids=lambda s: s.init.kind)
def test_resumed_from_state_the_next_steps_have_the_same_bits(
    rig: Callable[..., Rig], base: pathlib.Path, wanted: c.AdapterSpec
) -> None:
    mine = rig(base=base)
    mine.reset([start("a", wanted, optimizer=DECAY)])
    for found in STEPS[:2]:
        mine.step(found)
    state = mine.save("a")["a"]
    resumed = rig(base=base, slots=2)
    resumed.reset([start("a", wanted, optimizer=DECAY, state=state)])
    for found in STEPS[2:]:
        mine.step(found)
        resumed.step(found)
    assert same_rows(mine.row("a"), resumed.row("a"))
    assert resumed.export("a").factor_digests == mine.export("a").factor_digests


def test_members_share_a_bank_whatever_each_of_them_freezes(rig: Callable[..., Rig], base: pathlib.Path) -> None:
    """Rank 8 doubled, rank 16 and MiCA of rank 16 have one shape; each trains as it does alone."""
    wanted = {
        "a": spec("PiSSA", "Rank2r"),
        "b": adapter(rank=16),
        "c": adapter(rank=16, init=InitSpec(kind="MiCA")),
    }
    found = [examples(wanted, each=2, vocab=96, seed=s) for s in range(3)]
    alone = {}
    for name, one in wanted.items():
        mine = rig(base=base)
        mine.reset([start(name, one, optimizer=DECAY)])
        for some in found:
            mine.step([e for e in some if e.member == name])
        alone[name] = mine.row(name)
    mine = rig(base=base)
    mine.reset([start(m, s, optimizer=DECAY) for m, s in wanted.items()])
    for some in found:
        mine.step(some)
    assert len(mine.trainer._tables) == 1
    assert all(same_rows(mine.row(m), alone[m]) for m in wanted)


def test_factors_are_computed_once_for_all_trainers_and_smaller_ranks(
    rig: Callable[..., Rig], base: pathlib.Path
) -> None:
    computed = []
    for wanted in (spec("MiLoRA", "Rank2r"), MICA, spec("OLoRATail", "Rank2r", rank=2), spec("PiSSA", "Rank2r")):
        mine = rig(base=base)
        mine.reset([start("a", wanted)])
        mine.admit("a")
        assert mine.initialiser is not None
        computed.append(mine.initialiser.source.computed)
    assert computed == [14, 0, 0, 14]


def test_damaged_factors_are_told_by_file_and_the_run_that_was_there_goes_on(
    rig: Callable[..., Rig], base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rig(base=base).reset([start("a", MICA)])
    (path,) = (tmp_path / "store/factors").rglob("model.layers.1.mlp.up_proj.safetensors")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    mine = rig(base=base)
    mine.reset([start("b", adapter())])
    with pytest.raises(DigestMismatch, match=r"up_proj\.safetensors: expected sha256 .*, found .*; delete the file"):
        mine.reset([start("a", MICA)])
    mine.admit("b")
    path.unlink()
    mine.reset([start("a", MICA)])
    assert mine.initialiser is not None and mine.initialiser.source.computed == 1


def test_a_store_that_does_not_answer_is_unavailable(
    rig: Callable[..., Rig], base: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise StoreUnavailable("connection refused")

    monkeypatch.setattr(Objects, "get", refuse)
    with pytest.raises(Unavailable, match="connection refused"):
        rig(base=base).reset([start("a", MICA)])


@pytest.fixture(scope="module")
def pissa(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_residual(base, tmp_path_factory.mktemp("bases") / "pissa", spec("PiSSA", "SharedResidual"))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (spec("PiSSA", "SharedResidual", rank=4), "expected .* after PiSSA of rank 4.*found .*, after PiSSA of rank 8"),
        (spec("PiSSA", "SharedResidual", alpha=8), "rank 8, scale 1.*after PiSSA of rank 8, scale 0.5"),
        (spec("MiLoRA", "SharedResidual"), "after MiLoRA"),
        (spec("PiSSA", "SharedResidual", targets=("q_proj",)), "on q_proj, found"),
        (spec("PiSSA", "Rank2r"), "init PiSSA, Rank2r: expected the base .* itself"),
        (MICA, "init MiCA, Untouched: expected the base .* itself"),
        (adapter(), "init Standard, Untouched: expected the base .* itself"),
    ],
)
def test_a_member_of_another_base_is_refused_with_both_digests(
    pissa: pathlib.Path, base: pathlib.Path, tmp_path: pathlib.Path, model: BaseModel, wanted: c.AdapterSpec, words: str
) -> None:
    mine = Rig(model, tmp_path, base=pissa)  # the model is not looked at
    with pytest.raises(InvalidRequest, match=words) as refused:
        mine.reset([start("a", wanted)])
    assert bases.digest(base) in str(refused.value) and bases.digest(pissa) in str(refused.value)


def test_a_shared_residual_on_the_base_itself_is_refused(rig: Callable[..., Rig], base: pathlib.Path) -> None:
    with pytest.raises(InvalidRequest, match=f"residual base of {bases.digest(base)}.*found .* itself"):
        rig(base=base).reset([start("a", spec("PiSSA", "SharedResidual"))])


def test_the_rank_that_must_fit_is_the_one_that_is_stored(rig: Callable[..., Rig], base: pathlib.Path) -> None:
    with pytest.raises(InvalidRequest, match=r"at most 16 \(--max-rank\), found 32 \(twice 16, by baseMode Rank2r\)"):
        rig(base=base).reset([start("a", spec("PiSSA", "Rank2r", rank=16))])
    with pytest.raises(InvalidRequest, match=r"k_proj: rank: expected at most 32 for a weight of \(32, 64\)"):
        mine = rig(base=base)
        mine.trainer.limits = mine.trainer.limits.__class__(**(vars(mine.trainer.limits) | {"max_rank": 64}))
        mine.reset([start("a", adapter(rank=64, init=InitSpec(kind="MiCA")))])


@pytest.mark.parametrize("kind", CHANGING)
def test_a_residual_base_in_bfloat16_is_rounded_once(
    model: BaseModel, base: pathlib.Path, tmp_path: pathlib.Path, kind: Any
) -> None:
    wanted = spec(kind, "SharedResidual", alpha=0.5, scaling="Fixed")
    folder = write_residual(base, tmp_path / "residual", wanted, dtype=torch.bfloat16)
    mine = Rig(build(folder), tmp_path / "store", base=folder)
    mine.reset([start("a", wanted)])
    mine.admit("a")
    gap = np.abs(np.array(exported(mine)[0]) - np.array(of_base(model))).max()
    assert 1e-5 < gap < 0.05
