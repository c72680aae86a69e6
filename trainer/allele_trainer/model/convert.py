"""Hugging Face weights → Megatron names.

Every Megatron parameter must be filled and every tensor of the folder used: one missing or left over means that the
folder is not the model that its config says, and training on it would be silently wrong.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import torch
from safetensors import safe_open
from torch import Tensor, nn

from allele_trainer.model.config import BaseConfig, UnsupportedBase

_NORMS = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
"""Parameters of a layer that only change their name."""


class Weights:
    """Tensors of all `*.safetensors` of a folder, by name, each read when asked for."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - not a mapping
        self.unused = set(self._where)
        self._folder = folder

    def __call__(self, name: str) -> Tensor:
        if name not in self._where:
            raise UnsupportedBase(f"{self._folder}: expected a tensor {name}, found none of that name")
        self.unused.discard(name)
        return self._where[name].get_tensor(name)


def load_base(model: nn.Module, folder: pathlib.Path, *, config: BaseConfig) -> None:
    """Fill the model's parameters. Raises UnsupportedBase naming the tensor, the expected shape and the found one."""
    weights = Weights(folder)
    parameters = dict(model.named_parameters())
    for name, tensor in converted(weights, config):
        parameter = parameters.pop(name)
        if parameter.shape != tensor.shape:
            raise UnsupportedBase(f"{name}: expected shape {tuple(parameter.shape)}, found {tuple(tensor.shape)}")
        with torch.no_grad():
            parameter.copy_(tensor)
    if config.tied:
        weights.unused.discard("lm_head.weight")
    if parameters or weights.unused:
        raise UnsupportedBase(
            f"{folder}: expected the tensors of a Qwen3 model; "
            f"not filled: {sorted(parameters)}, not used: {sorted(weights.unused)}"
        )


def converted(weights: Weights, config: BaseConfig) -> Iterator[tuple[str, Tensor]]:
    """(Megatron name, tensor) of the whole model."""
    yield "embedding.word_embeddings.weight", weights("model.embed_tokens.weight")
    for i in range(config.layers):
        hf, mc = f"model.layers.{i}", f"decoder.layers.{i}"
        for target, source in _NORMS.items():
            yield f"{mc}.{target}.weight", weights(f"{hf}.{source}.weight")
        q, k, v = (weights(f"{hf}.self_attn.{x}_proj.weight") for x in "qkv")
        yield f"{mc}.self_attention.linear_qkv.weight", fused_qkv(q, k, v, groups=config.groups)
        gate, up = (weights(f"{hf}.mlp.{x}_proj.weight") for x in ("gate", "up"))
        yield f"{mc}.mlp.linear_fc1.weight", torch.cat([gate, up])
    yield "decoder.final_layernorm.weight", weights("model.norm.weight")
    if not config.tied:
        yield "output_layer.weight", weights("lm_head.weight")


def fused_qkv(q: Tensor, k: Tensor, v: Tensor, *, groups: int) -> Tensor:
    """Megatron's order: for each key-value group its query heads, its key, its value."""
    return torch.cat([w.unflatten(0, (groups, -1)) for w in (q, k, v)], dim=1).flatten(0, 1)
