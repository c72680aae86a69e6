"""Folders of other trainers and engines become the same row; what a row cannot hold is refused with the way out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allele.format import AdapterShape, ShapeMismatch, adapter_config, export_peft, import_peft
from allele.format.shape import TARGETS
from tests.format.folders import bf16, save, save_bf16

Tensors = dict[str, np.ndarray]
LAYER = "base_model.model.model.layers.{}.{}.lora_{}.weight"


def fused(tensors: Tensors, module: str, parts: tuple[str, ...], a: str) -> Tensors:
    """`parts` of each layer as one: B stacked, A that of the first (`shared`) or stacked too (`blocks`)."""
    out = dict(tensors)
    for layer in range(2):
        a_s = [out.pop(LAYER.format(layer, p, "A")) for p in parts]
        b_s = [out.pop(LAYER.format(layer, p, "B")) for p in parts]
        out[LAYER.format(layer, module, "A")] = a_s[0] if a == "shared" else np.concatenate(a_s)
        out[LAYER.format(layer, module, "B")] = np.concatenate(b_s)
    return out


QKV = ("self_attn.qkv_proj", tuple(f"self_attn.{p}_proj" for p in "qkv"))
GATE_UP = ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"))


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n,
        lambda n: n.replace(".weight", ".default.weight"),
        lambda n: n.replace(".weight", ".my-policy.weight"),
        lambda n: n.removeprefix("base_model.model."),
        lambda n: n.removeprefix("base_model.model.model."),
        lambda n: n.replace("base_model.model.model.", "base_model.model."),
        lambda n: "module._orig_mod." + n,
    ],
    ids=["peft", "adapter name", "own adapter name", "no peft", "layers only", "without the head's model", "wrapped"],
)
def test_names_of_trainers_and_engines_are_known(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    tensors = {rename(name): a for name, a in reversed(shape.views(row).items())}
    found = import_peft(save(tmp_path / "a", tensors), shape)
    assert found.row == row.tobytes()
    assert found.scale == 2.0


def test_an_export_comes_back_without_parsing_its_header(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row[:3] = [np.nan, -0.0, np.inf]
    export_peft(shape.pack(row), tmp_path, shape=shape, scale=0.7, base_name="tiny")
    monkeypatch.delattr("allele.format.header.parse")
    found = import_peft(tmp_path, shape)
    assert (found.row, found.scale) == (row.tobytes(), pytest.approx(0.7))


@pytest.mark.parametrize(("module", "parts"), [QKV, GATE_UP])
def test_a_fused_module_with_blocks_of_a_is_taken_apart(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, module: str, parts: tuple[str, ...]
) -> None:
    folder = save(tmp_path / "a", fused(shape.views(row), module, parts, "blocks"))
    assert import_peft(folder, shape).row == row.tobytes()


@pytest.mark.parametrize(("module", "parts"), [QKV, GATE_UP])
def test_a_fused_module_with_one_a_gives_it_to_each_part(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, module: str, parts: tuple[str, ...]
) -> None:
    wanted = shape.views(row)
    for layer in range(2):
        for p in parts[1:]:
            wanted[LAYER.format(layer, p, "A")][:] = wanted[LAYER.format(layer, parts[0], "A")]
    folder = save(tmp_path / "a", fused(shape.views(row), module, parts, "shared"))
    assert import_peft(folder, shape).row == row.tobytes()


def test_both_fused_modules_at_once_as_an_engine_has_them(shape: AdapterShape, row: np.ndarray, tmp_path: Path) -> None:
    tensors = fused(fused(shape.views(row), *QKV, "blocks"), *GATE_UP, "blocks")
    tensors = {name.removeprefix("base_model.model."): a for name, a in tensors.items()}
    assert len(tensors) == 2 * 2 * 4
    assert import_peft(save(tmp_path / "a", tensors), shape).row == row.tobytes()


def test_the_adapter_is_found_in_a_trainers_folder(shape: AdapterShape, row: np.ndarray, tmp_path: Path) -> None:
    folder = save(tmp_path / "out/checkpoint-70", shape.views(row))
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "model.safetensors"):
        (folder / name).write_bytes(b"\x80\x04 not to be read")
    found = import_peft(tmp_path / "out", shape)
    assert found.row == row.tobytes()
    assert found.weights == folder / "adapter_model.safetensors"

    save(tmp_path / "out/checkpoint-80", shape.views(row * 2))
    with pytest.raises(ShapeMismatch, match=r"one in each of checkpoint-70, checkpoint-80; name one"):
        import_peft(tmp_path / "out", shape)
    assert import_peft(tmp_path / "out/checkpoint-80", shape).row == (row * 2).tobytes()

    save(tmp_path / "top", shape.views(row * 3))
    (tmp_path / "top/checkpoint-9").mkdir()
    (tmp_path / "top/checkpoint-9/adapter_model.safetensors").write_bytes(b"another")
    assert import_peft(tmp_path / "top", shape).row == (row * 3).tobytes()


def product(tensors: Tensors, module: str, layer: int = 0) -> np.ndarray:
    return tensors[LAYER.format(layer, module, "B")].astype("<f8") @ tensors[LAYER.format(layer, module, "A")]


def test_patterns_that_end_in_one_rank_and_scale_change_no_bits(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path
) -> None:
    patterns = {
        "r": 16,
        "lora_alpha": 64,
        "rank_pattern": dict.fromkeys(TARGETS, 4),
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 12} | {rf"self_attn\.{t}": 12 for t in TARGETS[:4]},
    }
    patterns["alpha_pattern"] |= dict.fromkeys(TARGETS[4:], 12)
    found = import_peft(save(tmp_path / "a", shape.views(row), **patterns), shape)
    assert found.row == row.tobytes()
    assert found.scale == 3.0


def test_smaller_ranks_are_padded_and_other_scales_go_into_b(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path
) -> None:
    tensors = shape.views(row)
    for layer in range(2):
        for half in "AB":
            name = LAYER.format(layer, "self_attn.q_proj", half)
            tensors[name] = tensors[name][:2] if half == "A" else tensors[name][:, :2]
    folder = save(tmp_path / "a", tensors, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 5})

    found = import_peft(folder, shape)
    got = shape.views(found.row)

    assert found.scale == 2.0
    np.testing.assert_array_equal(got[LAYER.format(0, "self_attn.q_proj", "A")][2:], 0)
    np.testing.assert_array_equal(got[LAYER.format(0, "self_attn.q_proj", "B")][:, 2:], 0)
    for module, layer, scale in (("self_attn.q_proj", 1, 4.0), ("mlp.up_proj", 1, 1.25), ("mlp.up_proj", 0, 2.0)):
        want, found_ = scale * product(tensors, module, layer), 2.0 * product(got, module, layer)
        np.testing.assert_allclose(found_, want, rtol=0, atol=3e-7 * np.abs(want).max())
    untouched = [n for n in got if "q_proj" not in n and "layers.1.mlp.up_proj" not in n]
    assert all(np.array_equal(got[n], tensors[n]) for n in untouched)


def test_a_folder_of_a_smaller_rank_is_padded_and_of_a_larger_one_refused(
    shape: AdapterShape, config: dict[str, Any], row: np.ndarray, tmp_path: Path
) -> None:
    larger = AdapterShape.from_model(config, rank=8, targets=shape.targets)
    folder = save(tmp_path / "a", shape.views(row))
    got = larger.views(import_peft(folder, larger).row)
    np.testing.assert_array_equal(got[LAYER.format(1, "mlp.down_proj", "A")][4:], 0)
    np.testing.assert_array_equal(product(got, "mlp.down_proj", 1), product(shape.views(row), "mlp.down_proj", 1))
    smaller = AdapterShape.from_model(config, rank=2, targets=shape.targets)
    with pytest.raises(ShapeMismatch, match=r"r of layers\.\d\.\S+_proj: expected at most 2, the rank.*found 4"):
        import_peft(folder, smaller)


def test_another_scale_is_refused_with_both_numbers_unless_it_may_go_into_b(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path
) -> None:
    folder = save(tmp_path / "a", shape.views(row), lora_alpha=12, use_rslora=True)
    assert import_peft(folder, shape).scale == 6.0
    assert import_peft(folder, shape, scale=6.0).row == row.tobytes()
    with pytest.raises(ShapeMismatch, match=r"scale: expected 2, found 6; .*--fold-scale"):
        import_peft(folder, shape, scale=2.0)
    found = import_peft(folder, shape, scale=2.0, fold=True)
    assert found.scale == 2.0
    for name, values in shape.views(found.row).items():
        np.testing.assert_array_equal(values, shape.views(row)[name] * (3 if ".lora_B." in name else 1))

    export_peft(shape.pack(row), tmp_path / "ours", shape=shape, scale=6.0, base_name="tiny")
    assert import_peft(tmp_path / "ours", shape, scale=2.0, fold=True).row == found.row


def test_a_ratio_that_float32_cannot_hold_is_refused(shape: AdapterShape, row: np.ndarray, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", shape.views(row * 1e30), lora_alpha=1e29)
    with pytest.raises(ShapeMismatch, match=r"lora_B.*expected finite values"):
        import_peft(folder, shape, scale=1e-10, fold=True)


@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("stored", ["BF16", "F32"])
def test_dtypes_that_hold_the_values_are_taken_without_asking(
    config: dict[str, Any], row: np.ndarray, tmp_path: Path, source: str, stored: Any
) -> None:
    """As BF16 holds them: 8 bits of mantissa, which F16 holds too in its range."""
    plain = AdapterShape.from_model(config, rank=4, targets=TARGETS)
    shape = AdapterShape.from_model(config, rank=4, targets=TARGETS, dtype=stored)
    row = bf16(np.clip(np.abs(row), 1e-3, 10) * np.sign(row))
    tensors, bits = plain.views(row), (row.view("<u4") >> 16).astype("<u2")
    if source == "BF16":
        folder = save_bf16(tmp_path / "a", plain_views(plain, bits))
    else:
        kind = {"F16": "<f2", "F32": "<f4"}[source]
        folder = save(tmp_path / "a", {n: a.astype(kind) for n, a in tensors.items()})
    wanted = bits if stored == "BF16" else row
    assert import_peft(folder, shape).row == wanted.tobytes()


def plain_views(shape: AdapterShape, values: np.ndarray) -> Tensors:
    return {t.name: values[t.offset : t.offset + t.numel].reshape(t.shape) for t in shape.tensors}


def test_a_nan_of_bf16_keeps_its_bits(config: dict[str, Any], tmp_path: Path) -> None:
    """Even where it is padded, and so goes through float32."""
    small, large = (AdapterShape.from_model(config, rank=r, targets=TARGETS, dtype="BF16") for r in (4, 8))
    bits = np.full(small.numel, 0x7F81, dtype="<u2")
    folder = save_bf16(tmp_path / "a", plain_views(small, bits))
    assert import_peft(folder, small).row == bits.tobytes()
    assert set(np.unique(np.frombuffer(import_peft(folder, large).row, dtype="<u2"))) == {0, 0x7F81}


EXTRA = "base_model.model."


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (EXTRA + "lm_head.lora_A.weight", "lm_head.*expected a LoRA matrix.*output layer"),
        (EXTRA + "model.embed_tokens.weight", "embed_tokens.*save_embedding_layers=False"),
        (EXTRA + "lm_head.modules_to_save.weight", "lm_head"),
        (LAYER.format(0, "self_attn.q_proj", "B").replace(".weight", ".bias"), "trained bias"),
        (LAYER.format(0, "self_attn.q_proj", "magnitude_vector"), "DoRA"),
        (EXTRA + "model.layers.0.mlp.experts.base_layer.lora_A.weight", "adapted as one parameter"),
        (LAYER.format(0, "mlp.experts.3.up_proj", "A"), "expected no such tensor"),
        (LAYER.format(2, "mlp.up_proj", "A"), r"layers\.2\.\S+: expected no such tensor, found F32 \[4, 32\]; other"),
        (LAYER.format(0, "self_attn.qkv_proj", "A"), r"q_proj\.lora_A\S+: expected one of them, found \S+ and"),
        ("layers.0.mlp.up_proj.lora_A.ref.weight", r"up_proj\.lora_A\S+: expected one of them, found \S+ and"),
    ],
)
def test_a_tensor_that_has_no_place_is_refused_with_the_reason(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, extra: str, message: str
) -> None:
    folder = save(tmp_path / "a", shape.views(row) | {extra: np.ones((4, 32), dtype="<f4")})
    with pytest.raises(ShapeMismatch, match=message):
        import_peft(folder, shape)


def test_missing_tensors_and_other_shapes_and_dtypes_are_refused_naming_tensor_expected_and_found(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path
) -> None:
    views = shape.views(row)
    first, last = shape.tensors[0].name, shape.tensors[-1].name
    qkv = fused(views, *QKV, "blocks")
    a, b = (LAYER.format(0, "self_attn.qkv_proj", half) for half in "AB")
    cases: list[tuple[Tensors, str]] = [
        ({n: v for n, v in views.items() if n != last}, r"down_proj\.lora_B.*found no such tensor"),
        ({n: v for n, v in views.items() if "q_proj" not in n}, r"q_proj\.lora_A.*expected F32 \[4, 32\], found no"),
        (views | {first: views[first].T}, r"q_proj\.lora_A.*expected F32 \[4, 32\], found F32 \[32, 4\]"),
        (views | {first: views[first].reshape(-1)}, r"q_proj\.lora_A.*found F32 \[128\]"),
        (views | {first: views[first].astype("<f8")}, r"q_proj\.lora_A.*expected F32 or BF16 or F16, found F64"),
        (views | {first: views[first].astype("<i4")}, r"q_proj\.lora_A.*found I32"),
        (qkv | {a: qkv[a][:8]}, r"qkv_proj\.lora_A.*expected F32 \[4, 32\] or \[12, 32\], found F32 \[8, 32\]"),
        (qkv | {b: qkv[b][:-1]}, r"qkv_proj\.lora_B.*expected F32 \[128, 4\], found F32 \[127, 4\]"),
    ]
    for i, (tensors, message) in enumerate(cases):
        with pytest.raises(ShapeMismatch, match=message):
            import_peft(save(tmp_path / str(i), tensors), shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora: expected unset, found True; DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: expected unset, found \['lm_head'\]; whole modules"),
        ({"bias": "lora_only"}, "bias: expected unset, found 'lora_only'; biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out.*transposed"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters.*each expert"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights.*'pissa_niter_4'; .*residual"),
        ({"peft_type": "LOHA"}, "peft_type: expected LORA, found 'LOHA'"),
        ({"r": 8}, r" r of layers\.\d\.\S+_proj: expected at most 4, the rank of the shape, found 8"),
        ({"r": 2}, r"_proj\.lora_A\S*: expected F32 \[2, (32|48)\], found F32 \[4, (32|48)\]"),
        ({"r": None}, "r: expected 1"),
        ({"r": True}, "r: expected 1"),
        ({"r": 0}, "r: expected 1"),
        ({"r": 10**400}, "r: expected 1"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a number"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a number"),
        ({"lora_alpha": -1}, "lora_alpha: expected a number"),
        ({"rank_pattern": {"(a+)+$": 2}}, r"rank_pattern: expected names of modules, found '\(a\+\)\+\$'; write out"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern q_proj: expected a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected an object"),
    ],
)
def test_a_config_that_makes_the_numbers_something_else_is_refused(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = adapter_config(shape, scale=8 / shape.rank, base_name="tiny") | change
    with pytest.raises(ShapeMismatch, match=message):
        import_peft(save(tmp_path / "a", shape.views(row), **config), shape)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", None])
def test_what_an_adapter_started_from_does_not_matter_where_the_base_is_untouched(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, init: object
) -> None:
    assert import_peft(save(tmp_path / "a", shape.views(row), init_lora_weights=init), shape).row == row.tobytes()


def test_pickles_links_and_other_things_are_refused_unread(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path
) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ShapeMismatch, match=message):
            import_peft(folder, shape)

    refused(tmp_path / "none", "expected a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"expected adapter_model\.safetensors in it")
    folder = save(tmp_path / "pickled/checkpoint-3", shape.views(row))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(tmp_path / "pickled", "checkpoint-3/adapter_model.bin, a pickle.*safe_serialization")
    refused(folder, "adapter_model.bin, a pickle")

    good = save(tmp_path / "good", shape.views(row))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        linked = save(tmp_path / f"linked-{name}", shape.views(row))
        (linked / name).unlink()
        (linked / name).symlink_to(good / name)
        refused(linked, re.escape(name) + ": expected a file, found a symbolic link; .*cp -rL")
        (linked / name).unlink()
        (linked / name).mkdir()
        refused(linked, re.escape(name) + ": expected a file, found d")
        (linked / name).rmdir()
        os.mkfifo(linked / name)
        refused(linked, re.escape(name) + ": expected a file, found p")
        (linked / name).unlink()
        (linked / name).touch()
        refused(linked, re.escape(name) + ": expected .*found 0 bytes")
    (good / "adapter_config.json").unlink()
    refused(good, r"adapter_config\.json: expected a file, found no such file")
