"""The fused step of many rows is AdamW with clipping for each of them, and leaves alone what it must."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from allele.format import AdapterShape
from allele.protocol import commands as c
from allele_trainer.bank.rows import Bank, NoGradientRow, Row, bank_bytes
from allele_trainer.bank.shard import Shard
from allele_trainer.bank.step import Update, step
from allele_trainer.parallel import initialise
from allele_trainer.server.trainer import NothingLearned
from tests.trainer.trainer_parts import ALL, Rig, adapter, examples, start

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
SHAPE = AdapterShape.from_model(CONFIG, rank=2, targets=ALL)
SLOTS = 7
RULES = [
    c.OptimizerSpec(),
    c.OptimizerSpec(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, clip=0.3),
    c.OptimizerSpec(clip=1e9, weight_decay=0.02),
]


def bank(dtype: torch.dtype = torch.float32, slots: int = SLOTS) -> Bank:
    return Bank(Shard(SHAPE), slots=slots, probes=2, device=torch.device("cpu"), dtype=dtype)


def row(seed: int) -> Row:
    generator = torch.Generator().manual_seed(seed)
    return Row(torch.randn(SHAPE.numel, generator=generator), torch.zeros(SHAPE.numel), torch.zeros(SHAPE.numel))


def gradient(seed: int, number: int) -> torch.Tensor:
    return torch.randn(SHAPE.numel, generator=torch.Generator().manual_seed(1000 * seed + number)) * (seed + 1) * 0.01


def stepped(mine: Bank, slots: list[int], *, steps: int = 3, trained: torch.Tensor | None = None) -> list[float]:
    norms = []
    for number in range(steps):
        for slot in slots:
            mine.gradient(slot).add_(gradient(slot, number))
        updates = [Update(s, 1e-2 / (s + 1), RULES[s % 3], trained) for s in slots]
        norms = [d.norm for d in step(mine, updates, ranks=initialise())]
    return norms


def test_each_row_steps_as_torchs_adamw_with_its_own_rule() -> None:
    mine = bank()
    for slot in range(SLOTS):
        mine.store(slot, row(slot), scale=1.0)
    norms = stepped(mine, list(range(SLOTS)))
    for slot in range(SLOTS):
        rule, parameter = RULES[slot % 3], torch.nn.Parameter(row(slot).weights)
        betas = (rule.beta1, rule.beta2)
        adamw = torch.optim.AdamW(
            [parameter], lr=1e-2 / (slot + 1), betas=betas, eps=rule.eps, weight_decay=rule.weight_decay
        )
        for number in range(3):
            parameter.grad = gradient(slot, number)
            norm = float(torch.nn.utils.clip_grad_norm_([parameter], rule.clip))
            adamw.step()
        assert norms[slot] == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(mine.weights(slot), parameter.detach(), rtol=0, atol=2e-6)


def test_a_rows_bits_depend_on_no_other_row_nor_on_where_its_gradient_lies() -> None:
    together = bank()
    for slot in range(SLOTS):
        together.store(slot, row(slot), scale=1.0)
    stepped(together, list(range(SLOTS)))
    for slots in ([3], [5, 3], [0, 3, 6]):
        mine = bank()
        for slot in slots:
            mine.store(slot, row(slot), scale=1.0)
        mine.gradient_row(1)  # another slot's gradient lies before theirs
        stepped(mine, slots)
        assert torch.equal(mine.weights(3), together.weights(3))
        assert torch.equal(mine.load(3).exp_avg_sq, together.load(3).exp_avg_sq)


def test_frozen_parts_take_no_step_no_decay_and_no_share_of_the_norm() -> None:
    mine, alone = bank(), bank()
    rest = torch.rand(SHAPE.numel, generator=torch.Generator().manual_seed(5)) < 0.4
    for b in (mine, alone):
        b.store(1, row(1), scale=1.0)
    norms = stepped(mine, [1], trained=rest.float())
    for number in range(3):
        alone.gradient(1).add_(gradient(1, number) * rest)
        expected = step(alone, [Update(1, 1e-2 / 2, RULES[1])], ranks=initialise())[0].norm
    found, start_row, whole = mine.load(1), row(1), alone.load(1)
    assert norms == [pytest.approx(expected, rel=1e-6)]
    assert torch.equal(found.weights[~rest], start_row.weights[~rest])
    assert not found.exp_avg[~rest].any() and not found.exp_avg_sq[~rest].any()
    torch.testing.assert_close(found.weights[rest], whole.weights[rest], rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_with_a_gradient_that_is_not_finite_stays_and_the_next_gradient_is_its_own(value: float) -> None:
    mine = bank()
    for slot in (0, 1):
        mine.store(slot, row(slot), scale=1.0)
        mine.gradient(slot).add_(gradient(slot, 0))
    mine.gradient(0)[5] = value
    sick, well = step(mine, [Update(s, 1e-2, RULES[0]) for s in (0, 1)], ranks=initialise())
    assert sick.skipped and not well.skipped and (sick.step, well.step) == (0, 1)
    assert torch.equal(mine.weights(0), row(0).weights)
    assert not mine.gradient(0).any()


def test_what_kernels_read_is_a_bfloat16_copy_made_when_a_row_is_stored_or_stepped() -> None:
    mine = bank(torch.bfloat16)
    for slot in range(SLOTS):
        mine.store(slot, row(slot), scale=1.0)
    stepped(mine, [0, 2], steps=2)
    block = mine.stacks[1, "linear_qkv"]
    for slot in range(SLOTS):
        copied = mine._read[slot, : SHAPE.numel]
        assert copied.dtype == torch.bfloat16
        assert torch.equal(copied, mine.weights(slot).bfloat16())
    assert block.a.dtype == torch.bfloat16 and block.a_grad.dtype == torch.float32
    probe = mine.store_probe(1, row(9).weights, scale=1.0)
    assert torch.equal(mine._read[probe, : SHAPE.numel], row(9).weights.bfloat16())


def test_a_slot_takes_fourteen_bytes_per_parameter_and_a_gradient_row_four() -> None:
    def nbytes(slots: int, gradients: int) -> int:
        return bank_bytes(SHAPE.numel, slots=slots, probes=3, gradients=gradients, dtype=torch.bfloat16)

    stride = -(-SHAPE.numel // 16) * 16
    assert nbytes(5, 2) - nbytes(4, 2) == 14 * stride
    assert nbytes(5, 3) - nbytes(5, 2) == 4 * stride


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_bank_are_known_before_it_is_made(dtype: torch.dtype) -> None:
    sizes = {"slots": 5, "probes": 3, "gradients": 2}
    made = Bank(Shard(SHAPE), **sizes, device=torch.device("cpu"), dtype=dtype)
    assert made.nbytes == bank_bytes(SHAPE.numel, **sizes, dtype=dtype)


def test_more_gradients_than_rows_for_them_are_refused() -> None:
    mine = Bank(Shard(SHAPE), slots=3, gradients=2, probes=0, device=torch.device("cpu"))
    mine.gradient(0), mine.gradient(2)
    with pytest.raises(NoGradientRow, match="slot 1: expected one of 2 gradient rows free"):
        mine.gradient(1)
    mine.drop_gradient(0)
    assert not mine.gradient(1).any()


def test_a_first_step_that_moves_nothing_is_an_error_that_names_the_member(rig: Callable[..., Rig]) -> None:
    mine = rig(slots=2)
    weights = {m: mine.random_weights(m, adapter(), seed=i) for i, m in enumerate("ab")}
    mine.reset([start(m, adapter(), weights=weights[m]) for m in "ab"])
    mine.admit("a", "b")
    mine.forward_backward(examples("ab", each=2, vocab=96))
    with pytest.raises(NothingLearned, match="member b: expected other weights after its first step"):
        mine.optim_step({"a": 1e-3, "b": 1e-30})
