"""PEFT itself loads what is exported, and what PEFT saves is imported bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from allele.format import AdapterShape, ShapeMismatch, export_peft, import_peft
from allele.format.shape import TARGETS
from allele.protocol.commands import AdapterSpec
from tests.format.folders import save

IDS = torch.arange(12).reshape(1, -1)


@pytest.mark.parametrize("scaling", ["Standard", "RankStabilised", "Fixed"])
def test_peft_loads_an_export_and_its_own_save_imports_back_bit_exactly(
    shape: AdapterShape, config: dict[str, Any], row: np.ndarray, tmp_path: Path, scaling: Any
) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    with torch.no_grad():
        plain = model(IDS).logits
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
        assert (loaded(IDS).logits - plain).abs().max() > 1e-3
    loaded.save_pretrained(str(tmp_path / "back"))
    back = import_peft(tmp_path / "back", shape)
    assert back.row == row.tobytes()
    assert back.scale == pytest.approx(spec.scale)


MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


def made_by_peft(base: Path, model: dict[str, Any], folder: Path, **lora: Any) -> torch.Tensor:
    """An adapter with random numbers, saved by PEFT over a random base; returns its logits for IDS."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model)).eval()
    plain.save_pretrained(base)
    adapted = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **lora)).eval()
    for name, weights in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weights, std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = str(base)  # or PEFT asks the hub for it
    adapted.save_pretrained(str(folder))
    with torch.no_grad():
        return adapted(IDS).logits


def loaded_by_peft(base: Path, folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saved_comes_back_with_the_same_logits(
    config: dict[str, Any], tmp_path: Path, model_type: str, rslora: bool
) -> None:
    model = config | {"model_type": model_type} | MODELS[model_type]
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    if model_type != "qwen3_moe":
        targets = TARGETS
    shape = AdapterShape.from_model(model, rank=4, targets=targets)
    base, theirs = tmp_path / "base", tmp_path / "theirs"
    logits = made_by_peft(base, model, theirs, r=4, lora_alpha=6, target_modules=list(targets), use_rslora=rslora)

    found = import_peft(theirs, shape)
    ours = export_peft(shape.pack(found.row), tmp_path / "ours", shape=shape, scale=found.scale, base_name=str(base))

    assert found.scale == (3.0 if rslora else 1.5)
    assert torch.equal(loaded_by_peft(base, ours), logits)


def test_ranks_and_alphas_by_module_keep_the_product(config: dict[str, Any], tmp_path: Path) -> None:
    shape = AdapterShape.from_model(config, rank=8, targets=TARGETS)
    base, theirs = tmp_path / "base", tmp_path / "theirs"
    made_by_peft(
        base,
        config,
        theirs,
        r=4,
        lora_alpha=6,
        target_modules=list(TARGETS),
        rank_pattern={"layers.1.mlp.up_proj": 8, "q_proj": 2},
        alpha_pattern={"o_proj": 5, "model.layers.0.self_attn.o_proj": 7},
    )

    found = import_peft(theirs, shape)
    ours = export_peft(shape.pack(found.row), tmp_path / "ours", shape=shape, scale=found.scale, base_name=str(base))

    assert found.scale == 1.5
    # PEFT sorts the patterns when it saves, and takes the first that matches: the file counts, not what was in memory.
    torch.testing.assert_close(loaded_by_peft(base, ours), loaded_by_peft(base, theirs), rtol=0, atol=2e-6)


def test_every_expert_of_an_export_is_loaded_by_peft(config: dict[str, Any], tmp_path: Path) -> None:
    """PEFT fuses experts block-diagonally when it loads them; what is computed is that of each expert's own B·A."""
    model = config | {"model_type": "qwen3_moe"} | MODELS["qwen3_moe"]
    shape = AdapterShape.from_model(model, rank=2, targets=TARGETS)
    row = np.random.default_rng(3).standard_normal(shape.numel).astype("<f4") / 4
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model)).eval()
    base = tmp_path / "base"
    plain.save_pretrained(base)
    folder = export_peft(shape.pack(row), tmp_path / "out", shape=shape, scale=0.5, base_name=str(base))

    logits = loaded_by_peft(base, folder)

    merge(plain, shape.views(row), scale=0.5)
    with torch.no_grad():
        torch.testing.assert_close(logits, plain(IDS).logits, rtol=0, atol=1e-5)


def merge(model: Any, tensors: dict[str, np.ndarray], *, scale: float) -> None:
    """W += scale · B·A for each target; experts are stacked, gate above up."""
    state = dict(model.named_parameters())
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        delta = scale * torch.from_numpy(b) @ torch.from_numpy(a)
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", module)
        with torch.no_grad():
            if expert is None:
                state[f"{module}.weight"] += delta
            elif expert[3] == "down_proj":
                state[f"{expert[1]}.down_proj"][int(expert[2])] += delta
            else:
                half = state[f"{expert[1]}.gate_up_proj"][int(expert[2])].chunk(2)
                half[expert[3] == "up_proj"].add_(delta)


def test_bits_are_lost_only_when_asked_and_then_rounded_to_nearest_even(
    config: dict[str, Any], row: np.ndarray, tmp_path: Path
) -> None:
    shape = AdapterShape.from_model(config, rank=4, targets=TARGETS, dtype="BF16")
    row[:6] = np.array([np.nan, -np.inf, 3.4e38, 1.00390625, 1.01171875, -0.0], dtype="<f4")  # 3 and 4 are ties
    folder = save(tmp_path / "a", {t.name: row[t.offset : t.offset + t.numel].reshape(t.shape) for t in shape.tensors})
    message = r"q_proj\.lora_A\S*: expected BF16 \[4, 32\], or values.*found F32 \[4, 32\]; .*--cast"
    with pytest.raises(ShapeMismatch, match=message):
        import_peft(folder, shape)
    found = torch.frombuffer(bytearray(import_peft(folder, shape, cast=True).row), dtype=torch.bfloat16)
    torch.testing.assert_close(found, torch.from_numpy(row).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_an_adapter_of_another_shape_is_not_exported(
    shape: AdapterShape, config: dict[str, Any], row: np.ndarray, tmp_path: Path
) -> None:
    other = AdapterShape.from_model(config, rank=8, targets=shape.targets)
    with pytest.raises(ShapeMismatch, match=r"q_proj\.lora_A"):
        export_peft(shape.pack(row), tmp_path, shape=other, scale=8 / shape.rank, base_name="tiny")
    assert not list(tmp_path.iterdir())
