"""Products with rows of a bank: one mathematics, whichever kernel a part's slots call for, and the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allele.format import AdapterShape
from allele_trainer.bank.banks import Banks
from allele_trainer.bank.rows import Bank
from allele_trainer.bank.shard import Shard
from allele_trainer.lora import grouped
from allele_trainer.lora.grouped import add_outer, product, transposed
from allele_trainer.lora.plan import Part, cut, parts_of
from tests.trainer.trainer_parts import ALL

SLOTS = 12
RAGGED = st.lists(st.sampled_from([0, 0, 1, 2, 3, 8, 8, 8, 17, 40]), min_size=1, max_size=SLOTS).filter(any)
EQUAL = st.builds(lambda slots, tokens: [tokens] * slots, st.integers(2, SLOTS), st.integers(1, 9))


def bank(*, slots: int = SLOTS, rank: int = 8) -> Bank:
    config = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    shape = AdapterShape.from_model(config, rank=rank, targets=ALL)
    made = Bank(Shard(shape), slots=slots, probes=0, device=torch.device("cpu"))
    made._weights.normal_(generator=torch.Generator().manual_seed(rank))
    return made


def tokens(part: Part, columns: int, *, seed: int) -> torch.Tensor:
    return torch.randn(part.end - part.begin, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=100, deadline=None)
@example(each=[2, 2, 2], rank=4, site="linear_qkv", kind="B")  # so few that torch's batched product is another one
@example(each=[1, 1], rank=4, site="linear_fc2", kind="A")
@given(
    each=st.one_of(RAGGED, EQUAL),
    rank=st.sampled_from([1, 2, 4, 8, 16]),
    site=st.sampled_from(["linear_qkv", "linear_fc2"]),
    kind=st.sampled_from("AB"),
)
def test_every_kernel_gives_the_bits_of_a_slot_computed_alone(each: list[int], rank: int, site: str, kind: str) -> None:
    rows = bank(rank=rank)
    stack = rows.stacks[0, site]
    weight, grad = (stack.a, stack.a_grad) if kind == "A" else (stack.b[-1], stack.b_grad[-1])
    counts = [(slot, n) for slot, n in enumerate(each) if n]
    together = parts_of(Banks([rows]), counts, gradients=True)
    x = torch.randn(sum(each), weight.shape[2], generator=torch.Generator().manual_seed(1))
    gy = torch.randn(sum(each), weight.shape[1], generator=torch.Generator().manual_seed(2))
    found = [(product(x[p.begin : p.end], weight, p), transposed(gy[p.begin : p.end], weight, p)) for p in together]
    for p in together:
        add_outer(grad, gy[p.begin : p.end], x[p.begin : p.end], p)
    y, gx = (torch.cat(parts) for parts in zip(*found, strict=True))
    ends = list(itertools.accumulate(n for _, n in counts))
    for (slot, n), end in zip(counts, ends, strict=True):
        mine = slice(end - n, end)
        (alone,) = parts_of(Banks([rows]), [(slot, n)], gradients=True)
        gradient = grad[rows.gradient_row(slot)].clone()
        grad[rows.gradient_row(slot)].zero_()
        add_outer(grad, gy[mine], x[mine], alone)
        assert torch.equal(y[mine], product(x[mine], weight, alone))
        assert torch.equal(gx[mine], transposed(gy[mine], weight, alone))
        assert torch.equal(gradient, grad[rows.gradient_row(slot)])
        torch.testing.assert_close(y[mine], x[mine] @ weight[slot].t())
        torch.testing.assert_close(gx[mine], gy[mine] @ weight[slot])
        torch.testing.assert_close(gradient, gy[mine].t() @ x[mine])


def test_kernels_are_chosen_by_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    for kernel in (grouped._Single, grouped._Grouped, grouped._Batched, grouped._SlotBySlot):
        inner = kernel.product
        monkeypatch.setattr(
            kernel,
            "product",
            staticmethod(lambda x, w, p, inner=inner, name=kernel.__name__: (chosen.append(name), inner(x, w, p))[1]),
        )

    def kernels(counts: Sequence[tuple[int, int]], *, rank: int = 8) -> list[str]:
        chosen.clear()
        rows = bank(rank=rank)
        for part in parts_of(Banks([rows]), counts, gradients=True):
            product(tokens(part, 64, seed=0), rows.stacks[0, "linear_qkv"].a, part)
        return list(chosen)

    assert kernels([(5, 7)]) == ["_Single"]
    assert kernels([(slot, 7) for slot in range(12)]) == ["_Batched"]
    assert kernels([(0, 3), (1, 7)]) == ["_Grouped"]
    assert kernels([(0, 3), *((slot, 7) for slot in range(2, 12))]) == ["_Single", "_Batched"]
    assert kernels([(slot, 7) for slot in range(12)], rank=2) == ["_SlotBySlot"]


def test_a_part_steps_over_small_gaps_and_holds_no_more_groups_than_a_kernel_takes() -> None:
    def cuts(slots: Sequence[int], *, most: int | None = None, each: Sequence[int] = (1, 2)) -> list[list[int]]:
        counts = [(slot, each[i % len(each)]) for i, slot in enumerate(slots)]
        return [[slot for slot, _ in part] for part in cut(counts, most=most)]

    assert cuts([0, 1, 9, 11]) == [[0, 1, 9, 11]]
    assert cuts([0, 1, 500, 501, 4000]) == [[0, 1], [500, 501], [4000]]
    assert cuts(range(20), most=8) == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]
    assert cuts(range(20), most=8, each=[5]) == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]
    assert cuts([0, 3, 6, 9], most=8) == [[0, 3, 6], [9]]
    assert cut([(0, 5), *((slot, 9) for slot in range(1, 9)), (9, 4), (10, 5)]) == [
        [(0, 5)],
        [(slot, 9) for slot in range(1, 9)],
        [(9, 4), (10, 5)],
    ]


@given(
    counts=st.dictionaries(st.integers(0, 60), st.integers(1, 4), min_size=1, max_size=40),
    most=st.one_of(st.none(), st.integers(1, 20)),
)
def test_parts_together_are_the_counts(counts: dict[int, int], most: int | None) -> None:
    ordered = sorted(counts.items())
    parts = cut(ordered, most=most)
    assert [count for part in parts for count in part] == ordered
    assert most is None or all(part[-1][0] - part[0][0] < most for part in parts)
