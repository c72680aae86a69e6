"""A packed adapter is a row behind a constant header, an ordinary safetensors file, refused by any other shape."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from allele.format import AdapterShape, ShapeMismatch
from allele.format.shape import TARGETS


def test_packing_and_unpacking_is_bit_exact(shape: AdapterShape, row: np.ndarray) -> None:
    row[:3] = [np.nan, -0.0, np.inf]
    assert shape.unpack(shape.pack(row)) == row.tobytes()


def test_bf16_rows_keep_their_bits(config: dict[str, Any]) -> None:
    shape = AdapterShape.from_model(config, rank=4, targets=["q_proj"], dtype="BF16")
    bits = np.arange(shape.numel, dtype="<u2")
    packed = shape.pack(bits)
    assert shape.unpack(packed) == bits.tobytes()
    name = shape.tensors[0].name
    assert (shape.views(shape.unpack(packed))[name].reshape(-1) == bits[: shape.tensors[0].numel]).all()


def test_the_safetensors_library_reads_it(shape: AdapterShape, row: np.ndarray) -> None:
    loaded = safetensors.numpy.load(shape.pack(row))
    views = shape.views(row)
    assert loaded.keys() == views.keys() == {t.name for t in shape.tensors}
    assert all((loaded[name] == views[name]).all() and loaded[name].shape == views[name].shape for name in loaded)


def test_fused_modules_are_contiguous_all_a_then_all_b(shape: AdapterShape) -> None:
    prefix = "base_model.model.model.layers.1."
    order = [t.name.removeprefix(prefix).removesuffix(".weight") for t in shape.tensors if t.name.startswith(prefix)]
    assert order == [
        "self_attn.q_proj.lora_A",
        "self_attn.k_proj.lora_A",
        "self_attn.v_proj.lora_A",
        "self_attn.q_proj.lora_B",
        "self_attn.k_proj.lora_B",
        "self_attn.v_proj.lora_B",
        "self_attn.o_proj.lora_A",
        "self_attn.o_proj.lora_B",
        "mlp.gate_proj.lora_A",
        "mlp.up_proj.lora_A",
        "mlp.gate_proj.lora_B",
        "mlp.up_proj.lora_B",
        "mlp.down_proj.lora_A",
        "mlp.down_proj.lora_B",
    ]


@settings(deadline=None, max_examples=60)
@given(
    rank=st.sampled_from([1, 2, 8, 64]),
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
    layers=st.integers(1, 4),
    heads=st.sampled_from([2, 4]),
    groups=st.sampled_from([1, 2]),
)
def test_tensors_cover_the_row_without_gap_and_do_not_depend_on_the_order_of_targets(
    rank: int, targets: list[str], layers: int, heads: int, groups: int
) -> None:
    config = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 8,
    }
    shape = AdapterShape.from_model(config, rank=rank, targets=targets)
    ends = itertools.accumulate(t.numel for t in shape.tensors)
    assert [t.offset + t.numel for t in shape.tensors] == list(ends)
    assert shape.numel == sum(t.shape[0] * t.shape[1] for t in shape.tensors)
    assert len(shape.header) % 64 == 0
    assert shape.digest == AdapterShape.from_model(config, rank=rank, targets=targets[::-1]).digest
    widths = {t.name.split(".")[-3]: t.shape for t in shape.tensors if "lora_B" in t.name}
    assert widths.get("k_proj", (groups * 8, rank)) == (groups * 8, rank)


def test_an_adapter_of_another_rank_is_refused_naming_the_tensor(
    shape: AdapterShape, config: dict[str, Any], row: np.ndarray
) -> None:
    other = AdapterShape.from_model(config, rank=8, targets=shape.targets)
    with pytest.raises(
        ShapeMismatch, match=r"layers\.0\.self_attn\.q_proj\.lora_A.*expected F32 \[8, 32\].*found F32 \[4, 32\]"
    ):
        other.unpack(shape.pack(row))


def test_an_adapter_of_another_dtype_is_refused_naming_the_tensor(
    shape: AdapterShape, config: dict[str, Any], row: np.ndarray
) -> None:
    other = AdapterShape.from_model(config, rank=4, targets=shape.targets, dtype="BF16")
    with pytest.raises(ShapeMismatch, match=r"q_proj\.lora_A.*expected BF16.*found F32"):
        other.unpack(shape.pack(row))


def test_missing_and_extra_modules_are_refused_naming_the_tensor(
    shape: AdapterShape, config: dict[str, Any], row: np.ndarray
) -> None:
    fewer = AdapterShape.from_model(config, rank=4, targets=["q_proj", "v_proj"])
    with pytest.raises(ShapeMismatch, match=r"k_proj\.lora_A.*expected no such tensor"):
        fewer.unpack(shape.pack(row))
    with pytest.raises(ShapeMismatch, match=r"k_proj\.lora_A.*found no such tensor"):
        shape.unpack(fewer.pack(row[: fewer.numel]))


def test_the_same_tensors_in_another_order_are_refused(shape: AdapterShape, row: np.ndarray) -> None:
    shuffled = safetensors.numpy.save(dict(reversed(shape.views(row).items())))
    with pytest.raises(ShapeMismatch, match="laid out otherwise"):
        shape.unpack(shuffled)


@pytest.mark.parametrize("cut", [0, 5, 300, -1])
def test_a_truncated_adapter_is_refused(shape: AdapterShape, row: np.ndarray, cut: int) -> None:
    with pytest.raises(ShapeMismatch, match="expected"):
        shape.unpack(shape.pack(row)[:cut])


def test_bytes_that_are_no_adapter_are_refused(shape: AdapterShape) -> None:
    junk = json.dumps(["not", "a", "header"]).encode()
    for data in (b"\xff" * 4096, len(junk).to_bytes(8, "little") + junk, b""):
        with pytest.raises(ShapeMismatch, match="packed adapter"):
            shape.unpack(data)


def test_a_row_of_the_wrong_size_is_refused(shape: AdapterShape, row: np.ndarray) -> None:
    with pytest.raises(ShapeMismatch, match="row: expected"):
        shape.pack(row.astype("<f2"))
    with pytest.raises(ShapeMismatch, match="contiguous"):
        shape.pack(np.zeros((shape.numel, 2), dtype="<f4")[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 257}, "rank"),
        ({"targets": ["q_proj", "lm_head"]}, "targets"),
        ({"targets": ["q_proj", "q_proj"]}, "targets"),
        ({"targets": []}, "targets"),
        ({"dtype": "F16"}, "dtype"),
    ],
)
def test_an_impossible_shape_is_refused(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeMismatch, match=f"^{message}: expected"):
        AdapterShape.from_model(config, **({"rank": 4, "targets": ["q_proj"]} | change))


def test_a_config_without_sizes_and_experts_in_the_mlp_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ShapeMismatch, match=r"config\.json hidden_size"):
        AdapterShape.from_model(config | {"hidden_size": None}, rank=4, targets=["q_proj"])
    with pytest.raises(ShapeMismatch, match="experts"):
        AdapterShape.from_model(config | {"num_experts": 8}, rank=4, targets=["q_proj", "up_proj"])


def test_every_expert_has_tensors_of_its_own_in_pefts_names() -> None:
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "num_experts": 128,
        "moe_intermediate_size": 768,
    }
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = AdapterShape.from_model(config, rank=1, targets=targets)
    assert len(shape.tensors) == 37_248
    sizes = {t.name: t.shape for t in shape.tensors}
    experts = "base_model.model.model.layers.47.mlp.experts"
    assert sizes[f"{experts}.127.gate_proj.lora_A.weight"] == (1, 2048)
    assert sizes[f"{experts}.127.gate_proj.lora_B.weight"] == (768, 1)
    assert sizes[f"{experts}.0.down_proj.lora_A.weight"] == (1, 768)
    first = [t.name for t in shape.tensors if ".layers.0.mlp." in t.name][:3]
    assert [n.split("experts.")[1] for n in first] == [f"{e}_proj.lora_A.weight" for e in ("0.gate", "0.up", "1.gate")]
    assert AdapterShape.from_model(config, rank=1, targets=["q_proj"]).tensors[0].shape == (1, 2048)
    for key, value in (("decoder_sparse_step", 2), ("mlp_only_layers", [0])):
        with pytest.raises(ShapeMismatch, match=rf"config\.json {key}: expected"):
            AdapterShape.from_model(config | {key: value}, rank=1, targets=["up_proj"])


def test_unpacking_and_viewing_copy_nothing_and_packing_copies_once(config: dict[str, Any]) -> None:
    shape = AdapterShape.from_model(config | {"intermediate_size": 65536}, rank=32, targets=["gate_proj", "down_proj"])
    row = np.ones(shape.numel, dtype="<f4")
    assert len(shape.header) > 0
    tracemalloc.start()
    packed = shape.pack(row)
    assert tracemalloc.get_traced_memory()[1] < 1.1 * shape.nbytes
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    views = shape.views(shape.unpack(packed))
    grown = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert grown < 64_000
    assert np.shares_memory(views[shape.tensors[-1].name], np.frombuffer(packed, dtype="u1"))
