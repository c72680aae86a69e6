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

from allele_trainer.model.batch import to_device
from allele_trainer.model.build import BaseModel, build
from allele_trainer.model.config import UnsupportedBase
from allele_trainer.rl.packing import Sample, pack
from tests.trainer.conftest import EXAMPLE_BASE


def test_packed_logprobs_equal_hugging_face(example_model: BaseModel) -> None:
    rng = np.random.default_rng(0)
    lengths = [(6, 8), (1, 1), (3, 30), (25, 20)]
    samples = [Sample(0, *(rng.integers(0, 48, n).tolist() for n in pair)) for pair in lengths]
    packed = pack(samples)
    with torch.no_grad():
        batch = to_device(packed, plan=None, device=example_model.device)
        found = example_model.logprobs(batch, torch.as_tensor(packed.targets))
        reference = transformers.Qwen3ForCausalLM.from_pretrained(EXAMPLE_BASE, attn_implementation="eager")
        expected = []
        for s in samples:
            logits = reference(input_ids=torch.tensor([[*s.prompt, *s.completion]])).logits[0, len(s.prompt) - 1 : -1]
            expected.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(s.completion)[:, None])[:, 0])
    assert (found - torch.cat(expected)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "llama"), ("attention_bias", True), ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4})],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(
    base: pathlib.Path, tmp_path: pathlib.Path, field: str, value: object
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    name = "rope_type" if field == "rope_parameters" else field
    with pytest.raises(UnsupportedBase, match=rf"config\.json {name}: expected .*, found"):
        build(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"expected a tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ("extra", r"not used: \['model\.layers\.7\.mlp\.up_proj\.weight'\]"),
        ("shape", r"decoder\.layers\.1\.mlp\.linear_fc1\.weight: expected shape \(256, 64\), found"),
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
