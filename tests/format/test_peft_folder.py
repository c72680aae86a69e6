"""PEFT itself loads what is exported, and what PEFT saves is imported bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from allele.format import AdapterShape, ShapeMismatch, adapter_config, export_peft, import_peft
from allele.protocol.commands import AdapterSpec


def save(directory: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("scaling", ["Standard", "RankStabilised", "Fixed"])
def test_peft_loads_an_export_and_its_own_save_imports_back_bit_exactly(
    shape: AdapterShape, config: dict[str, Any], row: np.ndarray, tmp_path: Path, scaling: Any
) -> None:
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    ids = torch.arange(12).reshape(1, -1)
    with torch.no_grad():
        plain = model(ids).logits
    base = tmp_path / "base"
    model.config.save_pretrained(base)  # or PEFT asks the hub for it when it saves
    packed = shape.pack(row)
    spec = AdapterSpec(rank=4, alpha=6, targets=shape.targets, scaling=scaling)
    exported = export_peft(packed, tmp_path / "out", shape=shape, scale=spec.scale, base_name=str(base))
    written = json.loads((exported / "adapter_config.json").read_text())
    assert written["lora_alpha"] / written["r"] == pytest.approx(spec.scale)  # all that SGLang reads

    loaded = PeftModel.from_pretrained(model, str(exported)).eval()

    state = get_peft_model_state_dict(loaded)
    views = shape.views(row)
    assert state.keys() == views.keys()
    assert all((state[name].numpy() == views[name]).all() for name in views)
    layer = loaded.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(spec.scale)
    with torch.no_grad():
        assert (loaded(ids).logits - plain).abs().max() > 1e-3
    loaded.save_pretrained(str(tmp_path / "back"))
    assert import_peft(tmp_path / "back", shape) == row.tobytes()


def test_tensors_are_taken_in_any_order(shape: AdapterShape, row: np.ndarray, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", dict(reversed(shape.views(row).items())), r=4)
    packed = shape.pack(import_peft(folder, shape))
    assert shape.unpack(packed) == row.tobytes()


def test_wrong_names_shapes_and_dtypes_are_refused_naming_tensor_expected_and_found(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path
) -> None:
    views = shape.views(row)
    first, last = shape.tensors[0].name, shape.tensors[-1].name
    renamed = {name.replace("layers.1", "layers.9"): a for name, a in views.items()}
    cases: list[tuple[dict[str, np.ndarray], str]] = [
        (renamed, r"layers\.1\..*expected F32.*found no such tensor"),
        ({n: a for n, a in views.items() if n != last}, r"down_proj\.lora_B.*found no such tensor"),
        (
            views | {"base_model.model.lm_head.lora_A.weight": row[:8]},
            r"lm_head.*expected no such tensor, found F32 \[8\]",
        ),
        (views | {first: views[first].T.copy()}, r"q_proj\.lora_A.*expected F32 \[4, 32\], found F32 \[32, 4\]"),
        (views | {first: views[first].astype("<f2")}, r"q_proj\.lora_A.*expected F32 .*found F16"),
    ]
    for i, (tensors, message) in enumerate(cases):
        with pytest.raises(ShapeMismatch, match=message):
            import_peft(save(tmp_path / str(i), tensors, r=4), shape)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"alpha_pattern": {"q_proj": 3}}, {"r": 8}])
def test_a_config_that_changes_what_the_numbers_mean_is_refused(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, change: dict[str, Any]
) -> None:
    config = adapter_config(shape, scale=8 / shape.rank, base_name="tiny") | change
    with pytest.raises(ShapeMismatch, match=next(iter(change))):
        import_peft(save(tmp_path / "a", shape.views(row), **config), shape)


def test_a_truncated_file_is_refused(shape: AdapterShape, row: np.ndarray, tmp_path: Path) -> None:
    folder = export_peft(shape.pack(row), tmp_path, shape=shape, scale=8 / shape.rank, base_name="tiny")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ShapeMismatch, match=r"down_proj\.lora_B.*truncated"):
        import_peft(folder, shape)


def test_an_adapter_of_another_shape_is_not_exported(
    shape: AdapterShape, config: dict[str, Any], row: np.ndarray, tmp_path: Path
) -> None:
    other = AdapterShape.from_model(config, rank=8, targets=shape.targets)
    with pytest.raises(ShapeMismatch, match=r"q_proj\.lora_A"):
        export_peft(shape.pack(row), tmp_path, shape=other, scale=8 / shape.rank, base_name="tiny")
    assert not list(tmp_path.iterdir())
