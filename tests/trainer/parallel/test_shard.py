"""A rank's part of a row: the ranks together hold every element, and what several hold is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state

from allele.format import AdapterShape
from allele.format.shape import TARGETS
from allele_trainer.bank.layout import blocks
from allele_trainer.bank.shard import LayoutError, Place, Shard
from allele_trainer.parallel import Layout, UnsupportedLayout, initialise


def shape(*, layers: int, experts: int, rank: int, targets: list[str]) -> AdapterShape:
    config = {
        "model_type": "qwen3_moe" if experts else "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "intermediate_size": 32,
    }
    expert = {"num_experts": experts, "moe_intermediate_size": 20}
    return AdapterShape.from_model(config | expert if experts else config, rank=rank, targets=targets)


layouts = st.builds(
    lambda tp, pp, dp, ep: Layout(tp=tp, pp=pp, dp=dp, ep=min(ep, tp * dp), sequence_parallel=True),
    *(st.sampled_from([1, 2, 4]) for _ in range(4)),
)
shapes = st.builds(
    shape,
    layers=st.just(4),
    experts=st.sampled_from([0, 4]),
    rank=st.sampled_from([1, 2, 8]),
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
)


@given(layouts, shapes)
@settings(deadline=None, max_examples=60)
def test_the_ranks_of_any_layout_hold_the_whole_row_and_count_each_element_once(
    layout: Layout, found: AdapterShape
) -> None:
    whole = torch.arange(1.0, found.numel + 1)
    rebuilt, counted, holders = torch.zeros(2, found.numel), torch.zeros(found.numel), torch.zeros(found.numel)
    for rank in range(layout.processes):
        shard = Shard(found, layout.place(rank))
        assert shard.numel == sum(t.numel for t in shard.tensors)
        local = shard.take(whole)
        shard.put(torch.stack([local, 2 * local]), rebuilt)
        if layout.data_rank(rank):
            continue
        marks = torch.zeros(3, shard.numel)
        for line, slices in enumerate((shard.replicated, shard.counted, shard.experts)):
            for s in slices:
                marks[line, s] = 1
        seen = torch.zeros(3, found.numel)
        shard.put(marks, seen)
        held = torch.zeros(found.numel)
        shard.put(torch.ones(shard.numel), held)
        holders += held
        dense = 1 - seen[2]
        counted += seen[1]
        assert not (seen[1] * seen[2]).any(), "a piece of an expert is counted with the dense ones"
        assert torch.equal(seen[0] * dense, seen[0])
    assert torch.equal(rebuilt, torch.stack([whole, 2 * whole]))
    expert = torch.zeros(found.numel)
    for t in found.tensors:
        if ".experts." in t.name:
            expert[t.offset : t.offset + t.numel] = 1
    assert torch.equal(counted, 1 - expert)
    assert set(holders[expert == 0].tolist()) <= {1.0, float(layout.tp)}


@given(layouts, shapes)
@settings(deadline=None, max_examples=30)
def test_a_local_tensor_is_this_ranks_share_of_the_linear(layout: Layout, found: AdapterShape) -> None:
    whole = torch.randn(found.numel)
    views = {t.name: whole[t.offset : t.offset + t.numel].view(t.shape) for t in found.tensors}
    for rank in range(layout.processes):
        place = layout.place(rank)
        shard = Shard(found, place)
        local = shard.take(whole)
        for t in shard.tensors:
            full = views[t.name]
            if ".experts." not in t.name:
                by_inputs = "o_proj" in t.name or "down_proj" in t.name
                if by_inputs and "lora_A" in t.name:
                    full = full.chunk(place.tp, dim=1)[place.tp_rank]
                elif not by_inputs and "lora_B" in t.name:
                    full = full.chunk(place.tp, dim=0)[place.tp_rank]
            assert torch.equal(local[t.offset : t.offset + t.numel].view(t.shape), full)
        assert sum(len(b.targets) for b in blocks(shard).values()) == len(shard.tensors) // 2


def test_the_only_rank_holds_rows_themselves() -> None:
    found = shape(layers=2, experts=0, rank=4, targets=["q_proj", "down_proj"])
    shard, whole = Shard(found), torch.randn(3, found.numel)
    assert shard.take(whole) is whole and shard.replicated == () and shard.counted == (slice(0, found.numel),)


def test_what_does_not_divide_is_refused_by_name() -> None:
    found = shape(layers=4, experts=0, rank=4, targets=["q_proj"])
    with pytest.raises(LayoutError, match=r"layers: expected a multiple of pp = 3, found 4"):
        Shard(found, Place(pp=3))
    with pytest.raises(LayoutError, match=r"q_proj\.lora_B\.weight outputs: expected a multiple of tp = 5, found 48"):
        Shard(found, Place(tp=5))
    experts = shape(layers=4, experts=6, rank=4, targets=["up_proj"])
    with pytest.raises(LayoutError, match=r"experts: expected a multiple of ep = 4, found 6"):
        Shard(experts, Place(ep=4))
    with pytest.raises(UnsupportedLayout, match=r"ep: expected a divisor of tp × dp = 2 .*, found 4"):
        Layout(tp=2, ep=4)


def test_an_unknown_tensor_and_a_torn_group_are_refused_by_name() -> None:
    found = shape(layers=1, experts=0, rank=4, targets=["q_proj", "k_proj"])
    first, *rest = found.tensors
    strange = dataclasses.replace(first, name="base_model.model.model.layers.0.self_attn.qkv.lora_A.weight")
    with pytest.raises(LayoutError, match="qkv"):
        Shard(dataclasses.replace(found, tensors=(strange, *rest)))
    interleaved = dataclasses.replace(found, tensors=(first, rest[1], rest[0], *rest[2:]))
    with pytest.raises(LayoutError, match=r"k_proj\.lora_A: expected"):
        blocks(Shard(interleaved))


def test_interleaved_stages_and_other_sizes_than_at_the_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    initialise()
    with pytest.raises(UnsupportedLayout, match=r"tp × pp × dp = 2 × 1 × 1: expected 2 processes .*, found 1"):
        initialise(Layout(tp=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UnsupportedLayout, match=r"expected \(1, 1, 1\), as this process was started with, found \(2, 1"
    ):
        initialise(Layout(tp=2))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", 2)
    with pytest.raises(UnsupportedLayout, match="interleaved"):
        initialise()
