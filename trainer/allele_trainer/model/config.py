"""Hugging Face `config.json` → Megatron's TransformerConfig.

Only what was checked against Hugging Face's own logits is accepted; a field that would change the computation and is
not handled is an error that names it, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig


class UnsupportedBase(Exception):
    """The base model needs something that this trainer does not compute."""


_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("qwen3",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}
"""Field → values that are computed as Hugging Face does; the first is the usual one."""


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The facts of a base model, and the raw fields for `AdapterShape.from_model`."""

    raw: Mapping[str, Any]
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    rope_theta: float
    tied: bool
    context: int

    @property
    def qkv_outputs(self) -> tuple[int, int, int]:
        return self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim


def read_config(folder: pathlib.Path) -> BaseConfig:
    """Read and check `config.json`. Raises UnsupportedBase naming the field, what is expected and what was found."""
    raw = json.loads((folder / "config.json").read_text())
    for field, allowed in _FIXED.items():
        if raw.get(field) not in allowed:
            raise UnsupportedBase(f"{folder}/config.json {field}: expected {allowed[0]!r}, found {raw.get(field)!r}")
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedBase(f"{folder}/config.json rope_type: expected 'default', found {rope['rope_type']!r}")
    return BaseConfig(
        raw=raw,
        layers=raw["num_hidden_layers"],
        hidden=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        groups=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        ffn=raw["intermediate_size"],
        vocab=raw["vocab_size"],
        norm_eps=raw["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 1e4,
        tied=bool(raw.get("tie_word_embeddings")),
        context=raw["max_position_embeddings"],
    )


def transformer_config(config: BaseConfig, *, cpu: bool) -> TransformerConfig:
    """One process, no dropout, fp32; fusions that need CUDA kernels off."""
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden,
        num_attention_heads=config.heads,
        num_query_groups=config.groups,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        use_cpu_initialization=cpu,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
