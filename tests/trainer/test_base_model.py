"""The frozen model computes what Hugging Face computes, or refuses the folder and says why."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from allele.store import BaseMismatch, bases
from allele_trainer.__main__ import main
from allele_trainer.model.batch import to_device
from allele_trainer.model.build import BaseModel, build
from allele_trainer.model.config import UnsupportedBase, check_layout, read_config
from allele_trainer.parallel import Layout, UnsupportedLayout
from allele_trainer.rl.packing import Sample, pack
from tests.trainer.conftest import EXAMPLE_BASE
from tests.trainer.random_base import write_base

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MIXTURE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
BASES: dict[str, dict[str, object]] = {
    "llama": {"model": "llama"},
    "llama with scaled rotary positions": {"model": "llama", "rope_parameters": LLAMA3},
    "experts with weights that sum to one": {"model": "qwen3_moe", "norm_topk_prob": True, **MIXTURE},
    "experts": {"model": "qwen3_moe", "norm_topk_prob": False, **MIXTURE},
}


def worst_logprob(model: BaseModel, folder: pathlib.Path, *, vocab: int) -> float:
    """Largest difference to Hugging Face's logprobs over ragged sequences, packed."""
    rng = np.random.default_rng(0)
    lengths = [(6, 8), (1, 1), (3, 30), (25, 20)]
    samples = [Sample(0, *(rng.integers(0, vocab, n).tolist() for n in pair)) for pair in lengths]
    packed = pack(samples)
    with torch.no_grad():
        batch = to_device(packed, plan=None, device=model.device)
        found = model.logprobs(batch, torch.as_tensor(packed.targets))
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        expected = []
        for s in samples:
            logits = reference(input_ids=torch.tensor([[*s.prompt, *s.completion]])).logits[0, len(s.prompt) - 1 : -1]
            expected.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(s.completion)[:, None])[:, 0])
    return float((found - torch.cat(expected)).abs().max())


def test_packed_logprobs_equal_hugging_face(example_model: BaseModel) -> None:
    assert worst_logprob(example_model, EXAMPLE_BASE, vocab=48) < 1e-5


@pytest.mark.parametrize("sizes", BASES.values(), ids=BASES)
def test_every_kind_of_base_equals_hugging_face(sizes: dict[str, object], tmp_path: pathlib.Path) -> None:
    folder = write_base(tmp_path / "base", **sizes)
    assert worst_logprob(build(folder), folder, vocab=96) < 1e-5


def test_rotary_scaling_is_read_in_the_form_of_older_folders(tmp_path: pathlib.Path) -> None:
    folder = write_base(tmp_path / "base", model="llama", rope_parameters=LLAMA3)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    new = read_config(folder)
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    path.write_text(json.dumps(config | {"rope_scaling": rope, "rope_theta": theta}))
    assert read_config(folder).rope_scaling == new.rope_scaling != None and read_config(folder).rope_theta == 1e4  # noqa: E711


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("rope_type", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("partial_rotary_factor", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [1]),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(
    base: pathlib.Path, tmp_path: pathlib.Path, field: str, value: object
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    key = "rope_parameters" if "rope" in str(value) else field
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedBase, match=rf"config\.json {field}: expected .*, found"):
        build(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"expected a tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ("extra", r"not used: \['model\.layers\.7\.mlp\.up_proj\.weight'\]"),
        ("shape", r"model\.layers\.1\.mlp\.up_proj\.weight: expected shape \(128, 64\), found \(124, 64\)"),
    ],
)
def test_tensors_that_are_not_the_configs_are_refused_by_name(
    base: pathlib.Path, tmp_path: pathlib.Path, change: str, message: str
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop("model.layers.1.mlp.up_proj.weight")
    if change == "extra":
        tensors["model.layers.7.mlp.up_proj.weight"] = tensor.clone()
    if change != "missing":
        tensors["model.layers.1.mlp.up_proj.weight"] = tensor[:-4].clone() if change == "shape" else tensor
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedBase, match=message):
        build(folder)


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        ("qwen3", Layout(pp=3), "layers: expected a multiple of pp = 3, found 2"),
        ("qwen3", Layout(tp=4), "key-value heads: expected a multiple of tp = 4, found 2"),
        ("qwen3", Layout(ep=2, dp=2), "ep: expected 1 for a model without experts, found 2"),
        ("qwen3_moe", Layout(ep=3, dp=3), "experts: expected a multiple of ep = 3, found 4"),
        ("qwen3_moe", Layout(tp=2), r"sequence_parallel: expected true for experts under tp > 1"),
    ],
)
def test_a_layout_over_which_the_model_does_not_divide_is_refused(
    tmp_path: pathlib.Path, model: str, layout: Layout, message: str
) -> None:
    folder = write_base(tmp_path / "base", model=model, **(MIXTURE if model == "qwen3_moe" else {}))
    with pytest.raises(UnsupportedLayout, match=message):
        check_layout(read_config(folder), layout)


def test_a_trainer_refuses_another_base_than_it_was_told(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = ["--base", str(base), "--base-digest", "sha256:other", "--store", f"file://{tmp_path}"]
    with pytest.raises(BaseMismatch, match=rf"expected the base sha256:other, found {bases.digest(base)}"):
        main(arguments)
