"""What only CUDA runs: its kernels, bfloat16 copies of rows, pages on a side stream, and a probe until memory is full.

`make test-gpu`; every other test computes on the CPU, also where there is a GPU.
"""

from __future__ import annotations

import pathlib

import pytest
import torch
import torch.nn.functional as F

from allele.format import AdapterShape
from allele.protocol import commands as c
from allele_trainer.bank.banks import Banks
from allele_trainer.bank.rows import Bank
from allele_trainer.bank.shard import Shard
from allele_trainer.bank.start import from_bytes
from allele_trainer.bank.table import Key
from allele_trainer.lora.grouped import add_outer, product, transposed
from allele_trainer.lora.plan import MOST_GROUPS, parts_of
from allele_trainer.model.build import BaseModel, build
from allele_trainer.model.norm import normalised, normalised_backward
from allele_trainer.server.capacity import probe
from tests.trainer.random_base import write_base
from tests.trainer.trainer_parts import ALL, Rig, adapter, examples, start
from tests.trainer.twin import PeftTwin

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
ROUNDING = 2.0**-7
"""Relative, of a sum of products of numbers in bfloat16."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_base(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def cuda(base: pathlib.Path) -> BaseModel:
    model = build(base)
    assert (model.device.type, model.dtype) == (DEVICE.type, DTYPE)
    return model


def gradient(rig: Rig, member: str) -> torch.Tensor:
    table = rig.trainer._runs["run"].tables[member]
    return table.bank.gradient(table.resident([Key("run", member)])[0]).float().cpu()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_the_norm_of_heads_is_torchs() -> None:
    x = torch.randn(7, 2, 4, 16, device=DEVICE, dtype=DTYPE)[:, :, :-1]
    weight = torch.randn(3, 16, device=DEVICE, dtype=DTYPE)
    gy = torch.randn_like(x)
    y, scale = normalised(x, weight, 1e-6)
    gx = normalised_backward(gy, x, weight, scale)
    exact = x.double().requires_grad_()
    expected = F.rms_norm(exact, (16,), eps=1e-6) * weight.double()
    expected.backward(gy.double())
    assert exact.grad is not None
    assert distance(y, expected.detach()) < ROUNDING and distance(gx, exact.grad) < ROUNDING


@pytest.mark.parametrize("slots", [1, 12, MOST_GROUPS + 70])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_products_are_those_of_each_slot_alone(slots: int, rank: int) -> None:
    """Equal, ragged and missing counts; more slots than one kernel takes; ranks that no grouped kernel takes."""
    shape = AdapterShape.from_model(
        {
            "model_type": "qwen3",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        rank=rank,
        targets=ALL,
    )
    bank = Bank(Shard(shape), slots=slots, probes=0, device=DEVICE, dtype=DTYPE)
    bank._weights.normal_()
    bank.refresh(range(slots))
    counts = [(slot, 1 + slot % 5 if slot < 8 else 3) for slot in range(slots) if slot % 11 != 10]
    stack = bank.stacks[0, "linear_fc2"]
    for weight, grad in ((stack.a, stack.a_grad), (stack.b[0], stack.b_grad[0])):
        for part in parts_of(Banks([bank]), counts, gradients=True):
            x = torch.randn(part.end - part.begin, weight.shape[2], device=DEVICE, dtype=DTYPE)
            gy = torch.randn(part.end - part.begin, weight.shape[1], device=DEVICE, dtype=DTYPE)
            y, gx = product(x, weight, part), transposed(gy, weight, part)
            add_outer(grad, gy, x, part)
            add_outer(grad, gy, x, part)
            for (slot, begin, end), row in zip(part.spans, part.rows, strict=True):
                w, mine, theirs = weight[slot].double(), x[begin:end].double(), gy[begin:end].double()
                assert distance(y[begin:end], mine @ w.T) < ROUNDING
                assert distance(gx[begin:end], theirs @ w) < ROUNDING
                assert distance(grad[row], 2 * theirs.T @ mine) < ROUNDING


def test_gradients_are_those_of_peft_on_a_cpu(cuda: BaseModel, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rig = Rig(cuda, tmp_path / "store", slots=8)
    specs = {
        "a": adapter(rank=8, alpha=16),
        "b": adapter(rank=4, alpha=4, targets=("q_proj", "v_proj")),
        "c": adapter(rank=1, alpha=2, targets=("up_proj", "o_proj")),
        "d": adapter(rank=8, alpha=8),
    }
    weights = {m: rig.random_weights(m, s, seed=i) for i, (m, s) in enumerate(specs.items())}
    rig.reset([start(m, s, weights=weights[m]) for m, s in specs.items()])
    rig.admit(*specs)
    found = examples(specs, each=6, vocab=96)
    rig.forward_backward(found)
    for member, spec in specs.items():
        mine = gradient(rig, member)
        twin = PeftTwin(base, rig.shape(spec), rig.store.read(weights[member]), spec, tmp_path / member)
        rule = c.OptimizerSpec(clip=1e9)
        twin.train([[e for e in found if e.member == member]], rate=1e-4, rule=rule)
        assert twin.first is not None
        assert distance(mine, twin.first / (1 - rule.beta1)) < 0.05, member


def test_gradients_are_those_of_training_alone(cuda: BaseModel, tmp_path: pathlib.Path) -> None:
    members = [f"m{i}" for i in range(9)]
    found = examples(members, each=5, vocab=96)

    def gradients(*company: str) -> dict[str, torch.Tensor]:
        rig = Rig(cuda, tmp_path / "store", slots=9)
        spec = adapter()
        rig.reset([start(m, spec, weights=rig.random_weights(m, spec, seed=int(m[1:]))) for m in company])
        rig.admit(*company)
        rig.forward_backward([e for e in found if e.member in company])
        return {m: gradient(rig, m) for m in company}

    together = gradients(*members)
    for member in members:
        assert distance(together[member], gradients(member)[member]) < ROUNDING, member


def test_members_of_few_slots_move_as_those_of_many(cuda: BaseModel, tmp_path: pathlib.Path) -> None:
    """48 over 8 slots, 4 at a time: rows go out and come in on the side stream meanwhile."""
    members = [f"m{i}" for i in range(48)]
    steps = [examples(members, each=2, vocab=96, seed=s) for s in range(3)]
    rows = {}
    for slots in (8, 48):
        rig = Rig(cuda, tmp_path / "store", slots=slots, wave=slots // 2)
        spec = adapter()
        rig.reset([start(m, spec, weights=rig.random_weights(m, spec, seed=int(m[1:]))) for m in members])
        first = {m: rig.row(m).weights.clone() for m in members}
        for found in steps:
            for i in range(0, len(members), slots // 2):
                part, after = members[i : i + slots // 2], members[i + slots // 2 : i + slots]
                rig.trainer.admit(c.Admit(header=rig.header(), members=tuple(part), next=tuple(after)))
                rig.forward_backward([e for e in found if e.member in part])
                rig.optim_step(dict.fromkeys(part, 1e-3))
        rows[slots] = {m: rig.row(m) for m in members}
    for m in members:
        assert rows[8][m].step == rows[48][m].step == len(steps)
        moved = [rows[slots][m].weights - first[m] for slots in rows]
        assert distance(*moved) < 0.1, m


def test_what_is_exported_is_what_the_probes_saw(cuda: BaseModel, tmp_path: pathlib.Path) -> None:
    rig = Rig(cuda, tmp_path / "store", slots=4)
    spec = adapter()
    rig.reset([start(m, spec, weights=rig.random_weights(m, spec, seed=i)) for i, m in enumerate("ab")])
    rig.step(examples("ab", each=4, vocab=96))
    probes = (c.ProbeSequence(prompt=(1, 2, 3), completion=(4, 5)),)
    done = rig.export("a", "b", probes=probes)
    assert done.probe_logprobs["a"] != done.probe_logprobs["b"]
    for m in "ab":
        packed = from_bytes(rig.shape(spec).unpack(rig.store.read(done.weights[m])))
        assert torch.equal(packed, rig.row(m).weights)


def test_slots_are_found_by_filling_the_device(cuda: BaseModel) -> None:
    found = probe(cuda, max_rank=16, max_tokens=1024)
    assert found.slots > 1 and found.wave == found.slots // 2
    assert "90% of what was free" in found.reason
