"""Hugging Face weights → the parameters of one rank, read in slices: no rank ever holds the whole model.

Every tensor that the config calls for must be in the folder with its shape, and every tensor of the folder used: one
missing or left over means that the folder is not the model that its config says, and training on it would be silently
wrong. Each rank checks the whole folder, so all of them refuse alike.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator

import torch
from safetensors import safe_open
from torch import Tensor, nn

from allele_trainer.bank.shard import Place
from allele_trainer.model.config import BaseConfig, UnsupportedBase

Shapes = dict[str, tuple[int, ...]]

_RENAMED = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "mlp.router": "mlp.gate",
}
"""Modules of a layer that are whole on each rank and only change their name."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+?)(?:\.weight)?$")


class Weights:
    """Tensors of all `*.safetensors` of a folder, by name; a slice is read when asked for."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - not a mapping
        self._folder = folder

    def check(self, expected: Shapes, *, optional: str | None) -> None:
        """Raises UnsupportedBase naming tensors that are missing, of another shape, or left over."""
        for name, shape in expected.items():
            if name not in self._where:
                raise UnsupportedBase(f"{self._folder}: expected a tensor {name}, found none of that name")
            found = tuple(self._where[name].get_slice(name).get_shape())
            if found != shape:
                raise UnsupportedBase(f"{self._folder} {name}: expected shape {shape}, found {found}")
        unused = self._where.keys() - expected.keys() - {optional}
        if unused:
            raise UnsupportedBase(
                f"{self._folder}: expected the tensors that config.json calls for; not used: {sorted(unused)}"
            )

    def __call__(self, name: str, *, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        part = self._where[name].get_slice(name)
        found: Tensor = part[rows, columns] if len(part.get_shape()) == 2 else part[rows]
        return found


def tensors(config: BaseConfig) -> Shapes:
    """Name and shape of every tensor of the whole model."""
    q, k, v = config.qkv_outputs
    found: Shapes = {_EMBEDDING: (config.vocab, config.hidden), "model.norm.weight": (config.hidden,)}
    if not config.tied:
        found[_HEAD] = config.vocab, config.hidden
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = found[f"{layer}.post_attention_layernorm.weight"] = (config.hidden,)
        for name, rows in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            found[f"{layer}.self_attn.{name}.weight"] = rows, config.hidden
        found[f"{layer}.self_attn.o_proj.weight"] = config.hidden, q
        if config.qk_norm:
            found[f"{layer}.self_attn.q_norm.weight"] = found[f"{layer}.self_attn.k_norm.weight"] = (config.head_dim,)
        mlps, ffn = [f"{layer}.mlp"], config.ffn
        if config.experts:
            mlps, ffn = [f"{layer}.mlp.experts.{e}" for e in range(config.experts.count)], config.experts.ffn
            found[f"{layer}.mlp.gate.weight"] = config.experts.count, config.hidden
        for mlp in mlps:
            found[f"{mlp}.gate_proj.weight"] = found[f"{mlp}.up_proj.weight"] = ffn, config.hidden
            found[f"{mlp}.down_proj.weight"] = config.hidden, ffn
    return found


def padded_vocab(config: BaseConfig, place: Place) -> int:
    """Rows of embedding and head over all tensor ranks: each has the same number, the last of them may be unused."""
    return -(-config.vocab // place.tp) * place.tp


def load_base(model: nn.Module, folder: pathlib.Path, *, config: BaseConfig, place: Place) -> None:
    """Fill the parameters of this rank. Raises UnsupportedBase naming the tensor, what is expected and found."""
    weights = Weights(folder)
    weights.check(tensors(config), optional=_HEAD if config.tied else None)
    reader = _Reader(weights, config, place)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, tensor in reader.parts(name, parameter):
                part.copy_(tensor)


@dataclasses.dataclass(frozen=True)
class _Reader:
    weights: Weights
    config: BaseConfig
    place: Place

    def parts(self, name: str, parameter: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(view of the parameter, what belongs there), together all of it."""
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            yield from self._vocabulary(name, parameter)
        elif name == "decoder.final_layernorm.weight":
            yield parameter, self.weights("model.norm.weight")
        elif match := _LAYER.match(name):
            first = self.place.pp_rank * (self.config.layers // self.place.pp)
            yield from self._layer(f"model.layers.{first + int(match[1])}", match[2], parameter)
        else:
            raise UnsupportedBase(f"parameter {name}: expected one with a counterpart in a Hugging Face folder")

    def _vocabulary(self, name: str, parameter: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        source = _HEAD if name == "output_layer.weight" and not self.config.tied else _EMBEDDING
        rows = parameter.shape[0]
        begin = min(self.place.tp_rank * rows, self.config.vocab)
        end = min(begin + rows, self.config.vocab)
        yield parameter[: end - begin], self.weights(source, rows=slice(begin, end))
        parameter[end - begin :].zero_()

    def _layer(self, layer: str, module: str, parameter: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if module in _RENAMED:
            yield parameter, self.weights(f"{layer}.{_RENAMED[module]}.weight")
        elif module == "self_attention.linear_qkv":
            q, k, v = (
                self.weights(f"{layer}.self_attn.{x}_proj.weight", rows=self._share(outputs))
                for x, outputs in zip("qkv", self.config.qkv_outputs, strict=True)
            )
            yield parameter, fused_qkv(q, k, v, groups=self.config.groups // self.place.tp)
        elif module == "self_attention.linear_proj":
            columns = self._share(self.config.qkv_outputs[0])
            yield parameter, self.weights(f"{layer}.self_attn.o_proj.weight", columns=columns)
        elif module == "mlp.linear_fc1":
            for part, x in zip(parameter.chunk(2), ("gate", "up"), strict=True):
                yield part, self.weights(f"{layer}.mlp.{x}_proj.weight", rows=self._share(self.config.ffn))
        elif module == "mlp.linear_fc2":
            yield parameter, self.weights(f"{layer}.mlp.down_proj.weight", columns=self._share(self.config.ffn))
        elif module in ("mlp.experts.fc1", "mlp.experts.fc2"):
            yield from self._experts(f"{layer}.mlp.experts", module, parameter)
        else:
            raise UnsupportedBase(
                f"parameter {layer} {module}: expected one with a counterpart in a Hugging Face folder"
            )

    def _experts(self, experts: str, module: str, parameter: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        first = self.place.ep_rank * parameter.shape[0]
        for e, expert in enumerate(parameter):
            if module.endswith("fc2"):
                yield expert, self.weights(f"{experts}.{first + e}.down_proj.weight")
            else:
                for part, x in zip(expert.chunk(2), ("gate", "up"), strict=True):
                    yield part, self.weights(f"{experts}.{first + e}.{x}_proj.weight")

    def _share(self, size: int) -> slice:
        each = size // self.place.tp
        return slice(self.place.tp_rank * each, (self.place.tp_rank + 1) * each)


def fused_qkv(q: Tensor, k: Tensor, v: Tensor, *, groups: int) -> Tensor:
    """Megatron's order: for each key-value group its query heads, its key, its value."""
    return torch.cat([w.unflatten(0, (groups, -1)) for w in (q, k, v)], dim=1).flatten(0, 1)
