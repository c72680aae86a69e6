"""Properties: what is packed or saved comes back bit for bit; what is damaged is refused, or not of the damaged kind.

ALLELE_FUZZ=20 draws twenty times as many examples.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from allele.format import AdapterShape, ShapeMismatch, StateShape, export_peft, import_peft
from allele.format.shape import TARGETS
from tests.format.folders import save, save_bf16

FUZZ = int(os.environ.get("ALLELE_FUZZ", "1"))
quick = settings(deadline=None, max_examples=40 * FUZZ, suppress_health_check=list(HealthCheck))
many = settings(deadline=None, max_examples=200 * FUZZ, suppress_health_check=list(HealthCheck))


@st.composite
def shapes(draw: st.DrawFn, most: int = 256) -> AdapterShape:
    """Of any targets, rank, dtype and model type, with sizes small enough to draw many."""
    model_type = draw(st.sampled_from(["qwen3", "qwen3_moe", "llama"]))
    head = draw(st.sampled_from([4, 6]))
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": draw(st.sampled_from([8, 20])),
        "intermediate_size": draw(st.sampled_from([12, 16])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": 4,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": head,
    }
    if model_type == "qwen3_moe":
        config |= {"num_experts": draw(st.integers(1, 3)), "moe_intermediate_size": draw(st.sampled_from([8, 10]))}
    return AdapterShape.from_model(
        config,
        rank=draw(st.sampled_from([r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256) if r <= most])),
        targets=draw(st.lists(st.sampled_from(TARGETS), min_size=1, unique=True)),
        dtype=draw(st.sampled_from(["F32", "BF16"])),
    )


def bits_of(shape: AdapterShape, seed: int) -> np.ndarray:
    """Any bits: NaN, infinities and zeros of both signs too."""
    kind = {"F32": "<u4", "BF16": "<u2"}[shape.dtype]
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max, shape.numel, dtype=kind, endpoint=True)


@quick
@given(shapes(), st.integers(0, 2**32))
def test_packing_unpacking_and_viewing_keep_every_bit(shape: AdapterShape, seed: int) -> None:
    row = bits_of(shape, seed)
    packed = shape.pack(row)
    assert len(packed) == shape.packed_bytes
    assert shape.unpack(packed) == row.tobytes()
    parts = shape.views(shape.unpack(packed))
    assert b"".join(parts[t.name].tobytes() for t in shape.tensors) == row.tobytes()


@quick
@given(shapes(), st.integers(0, 2**32), st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
def test_folders_come_back_bit_for_bit_ours_and_in_any_order(
    shape: AdapterShape, seed: int, scale: float, random: Any
) -> None:
    row = bits_of(shape, seed)
    with tempfile.TemporaryDirectory() as folder:
        export_peft(shape.pack(row), folder, shape=shape, scale=scale, base_name="tiny")
        found = import_peft(folder, shape, scale=scale)
        assert found.row == row.tobytes()
        assert found.scale == pytest.approx(scale, rel=1e-9)

        names = [t.name for t in shape.tensors]
        random.shuffle(names)
        views = {t.name: row[t.offset : t.offset + t.numel].reshape(t.shape) for t in shape.tensors}
        if shape.dtype == "F32":
            views = {n: a.view("<f4") for n, a in views.items()}
        write = save if shape.dtype == "F32" else save_bf16
        theirs = write(Path(folder) / "theirs", {n: views[n] for n in names}, r=shape.rank, lora_alpha=shape.rank)
        assert import_peft(theirs, shape).row == row.tobytes()


@quick
@given(shapes(most=32), st.integers(0, 2**32), st.data())
def test_fused_modules_and_smaller_ranks_keep_products(shape: AdapterShape, seed: int, data: st.DataObject) -> None:
    """Built from split modules of random ranks; q, k, v (gate, up) fused where they have one rank."""
    random = np.random.default_rng(seed)
    ranks = {t: data.draw(st.sampled_from([r for r in (1, 2, 4, 32) if r <= shape.rank])) for t in shape.targets}
    tensors: dict[str, np.ndarray] = {}
    for t in shape.tensors:
        module = t.name.split(".")[-3]
        small = (ranks[module], t.shape[1]) if ".lora_A." in t.name else (t.shape[0], ranks[module])
        tensors[t.name] = (random.integers(-128, 128, small) / 64).astype("<f4")  # BF16 and F16 hold them
    patterns = dict(ranks)
    products = {n: tensors[n.replace("lora_A", "lora_B")] @ a for n, a in tensors.items() if "lora_A" in n}
    for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        if set(parts) <= set(ranks) and len({ranks[p] for p in parts}) == 1:
            patterns[fused] = ranks[parts[0]]
            for name in [n for n in tensors if f".{parts[0]}." in n]:
                blocks = [tensors.pop(name.replace(parts[0], p)) for p in parts]
                tensors[name.replace(parts[0], fused)] = np.concatenate(blocks)
    kind = data.draw(st.sampled_from(["<f4", "<f2"]))
    with tempfile.TemporaryDirectory() as folder:
        config = {"r": 3, "lora_alpha": 3, "rank_pattern": patterns, "alpha_pattern": patterns}
        theirs = save(Path(folder) / "theirs", {n: a.astype(kind) for n, a in tensors.items()}, **config)
        found = import_peft(theirs, shape)
    assert found.scale == 1.0
    got = shape.views(found.row)
    if shape.dtype == "BF16":
        got = {n: (a.astype("<u4") << 16).view("<f4") for n, a in got.items()}
    for name, product in products.items():
        np.testing.assert_array_equal(got[name.replace("lora_A", "lora_B")] @ got[name], product)


FIXED = AdapterShape.from_model(
    {
        "model_type": "qwen3",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    },
    rank=2,
    targets=["q_proj", "k_proj", "v_proj"],
)
ROW = bits_of(FIXED, 1)
PACKED = FIXED.pack(ROW)
START = len(FIXED.header)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, upto: int) -> bytes:
    """`whole` with some bytes before `upto` flipped, inserted, deleted or repeated, or cut off; never itself."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(upto, len(data)) - 1)) if data else 0
        kind = draw(st.sampled_from(["flip", "insert", "delete", "repeat", "set", "cut"]))
        length = draw(st.integers(1, 8))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and data:
            data[at] = draw(st.sampled_from(list(b'0123456789-.,:"[]{} \\\x00\xff')))
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    assume(bytes(data) != whole)
    return bytes(data)


def relength(data: bytes) -> bytes:
    """With a first length that fits a header which has grown or shrunk before the same data."""
    length = len(data) - (len(PACKED) - START) - 8
    return max(0, length).to_bytes(8, "little") + data[8:]


@many
@given(st.one_of(damaged(PACKED, len(PACKED)), damaged(PACKED, START)))
def test_a_damaged_packed_adapter_is_refused_or_only_its_numbers_differ(data: bytes) -> None:
    try:
        found = FIXED.unpack(data)
    except ShapeMismatch:
        return
    assert data[:START] == FIXED.header
    assert found == data[START:] and len(data) == len(PACKED)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield export_peft(PACKED, path, shape=FIXED, scale=2.0, base_name="tiny")


@many
@given(st.one_of(damaged(PACKED, len(PACKED)), damaged(PACKED, START), damaged(PACKED, START).map(relength)))
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(folder: Path, data: bytes) -> None:
    """Damage that leaves a valid file (a blank, a name's letter in metadata) changes no tensor but those it hit."""
    (folder / "adapter_model.safetensors").write_bytes(data)
    try:
        found = import_peft(folder, FIXED)
    except ShapeMismatch:
        return
    theirs = safetensors.numpy.load(data)
    got = FIXED.views(found.row)
    assert {n.rpartition(".layers.")[2]: a.tobytes() for n, a in theirs.items()} == {
        n.rpartition(".layers.")[2]: a.tobytes() for n, a in got.items()
    }


CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}, "bias": "none"})


@many
@given(damaged(CONFIG.encode(), len(CONFIG)))
def test_a_damaged_config_is_refused_or_only_the_scale_differs(folder: Path, text: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(PACKED)
    (folder / "adapter_config.json").write_bytes(text)
    try:
        found = import_peft(folder, FIXED)
    except ShapeMismatch:
        return
    finally:
        (folder / "adapter_config.json").write_text(CONFIG)
    assert found.row == ROW.tobytes()
    assert found.scale > 0


@many
@given(damaged(StateShape(FIXED).pack(weights=ROW, exp_avg=ROW, exp_avg_sq=ROW, step=5), 700))
def test_a_damaged_state_is_refused_or_only_its_numbers_differ(data: bytes) -> None:
    layout = StateShape(FIXED)
    try:
        layout.unpack(data)
    except ShapeMismatch:
        return
    assert data.startswith(layout.header) and len(data) == len(layout.header) + layout.nbytes
