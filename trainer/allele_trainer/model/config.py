"""Hugging Face `config.json` → the facts of a base, and Megatron's TransformerConfig for a rank's part of it.

Only what was checked against Hugging Face's own logits is accepted; a field that would change the computation and is
not handled is an error that names it, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from allele_trainer.parallel import Layout, UnsupportedLayout


class UnsupportedBase(Exception):
    """The base model needs something that this trainer does not compute."""


_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("qwen3", "qwen3_moe", "llama"),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
}
"""Field → values that are computed as Hugging Face does; the first is the usual one."""

_ROPE = ("default", "llama3")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies stretched for a longer context, as Llama 3.1 does."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of every layer."""

    count: int
    ffn: int
    per_token: int
    normalised: bool
    """Whether the weights of a token's experts sum to one."""


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
    qk_norm: bool
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tied: bool
    context: int
    experts: Experts | None

    @property
    def qkv_outputs(self) -> tuple[int, int, int]:
        return self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim

    def rotary_frequencies(self) -> Tensor:
        """`[head_dim / 2]`, fp32. Llama 3.1: as Hugging Face's `_compute_llama3_parameters`, in its order."""
        found = 1.0 / (self.rope_theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim))
        s = self.rope_scaling
        if s is None:
            return found
        wavelength = 2 * math.pi / found
        long, short = s.original_context / s.low_freq_factor, s.original_context / s.high_freq_factor
        scaled = torch.where(wavelength > long, found / s.factor, found)
        smooth = (s.original_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        between = (1 - smooth) * scaled / s.factor + smooth * scaled
        return torch.where((wavelength >= short) & (wavelength <= long), between, scaled)


def read_config(folder: pathlib.Path) -> BaseConfig:
    """Read and check `config.json`. Raises UnsupportedBase naming the field, what is expected and what was found."""
    raw = json.loads((folder / "config.json").read_text())
    where = f"{folder}/config.json"
    for field, allowed in _FIXED.items():
        if raw.get(field) not in allowed:
            expected = " or ".join(repr(v) for v in allowed if v is not None)
            raise UnsupportedBase(f"{where} {field}: expected {expected}, found {raw.get(field)!r}")
    kinds = set(raw.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedBase(f"{where} layer_types: expected 'full_attention' in every layer, found {sorted(kinds)}")
    theta, scaling = _rope(raw, where)
    return BaseConfig(
        raw=raw,
        layers=raw["num_hidden_layers"],
        hidden=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        groups=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        ffn=raw["intermediate_size"],
        vocab=raw["vocab_size"],
        norm_eps=raw["rms_norm_eps"],
        qk_norm=raw["model_type"].startswith("qwen3"),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(raw.get("tie_word_embeddings")),
        context=raw["max_position_embeddings"],
        experts=_experts(raw) if raw["model_type"] == "qwen3_moe" else None,
    )


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, in the form of transformers 5 (`rope_parameters`) or before (`rope_theta`, `rope_scaling`)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE:
        raise UnsupportedBase(f"{where} rope_type: expected {' or '.join(map(repr, _ROPE))}, found {kind!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedBase(f"{where} partial_rotary_factor: expected 1.0, found {rope['partial_rotary_factor']!r}")
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 1e4
    if kind == "default":
        return theta, None
    return theta, Llama3Scaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )


def _experts(raw: Mapping[str, Any]) -> Experts:
    return Experts(
        count=raw.get("num_experts") or raw["num_local_experts"],
        ffn=raw["moe_intermediate_size"],
        per_token=raw["num_experts_per_tok"],
        normalised=bool(raw.get("norm_topk_prob")),
    )


def check_layout(config: BaseConfig, layout: Layout) -> None:
    """Raises UnsupportedLayout naming what of the model does not divide over the ranks."""
    sizes = {"layers": (config.layers, "pp", layout.pp), "key-value heads": (config.groups, "tp", layout.tp)}
    if config.experts is None:
        sizes["intermediate_size"] = config.ffn, "tp", layout.tp
        if layout.ep > 1:
            raise UnsupportedLayout(f"ep: expected 1 for a model without experts, found {layout.ep}")
    else:
        sizes["experts"] = config.experts.count, "ep", layout.ep
        if layout.tp > 1 and not layout.sequence_parallel:
            raise UnsupportedLayout(
                "sequence_parallel: expected true for experts under tp > 1 (each token would be dispatched tp times), "
                "found false"
            )
    for what, (found, axis, size) in sizes.items():
        if found % size:
            raise UnsupportedLayout(f"{what}: expected a multiple of {axis} = {size}, found {found}")


def transformer_config(config: BaseConfig, layout: Layout, *, cpu: bool) -> TransformerConfig:
    """No dropout; fp32 on CPU and bf16 on CUDA; fusions that need Transformer Engine or Apex off."""
    dtype = torch.float32 if cpu else torch.bfloat16
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden,
        num_attention_heads=config.heads,
        num_query_groups=config.groups,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=config.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # the layer's own module: `packed.SwiGLU`
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=not cpu,
        use_cpu_initialization=cpu,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        pipeline_dtype=dtype,
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",
        batch_p2p_sync=not cpu,
        calculate_per_token_loss=True,  # the schedule then leaves the loss as it is; weights are in the loss already
        **_recompute(layout),
        **_mixture(config.experts, layout),
    )


def _recompute(layout: Layout) -> dict[str, Any]:
    """Whole layers alone: recomputing parts of one would run its linears outside of the layer that enters the plan."""
    if not layout.recompute:
        return {}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _mixture(experts: Experts | None, layout: Layout) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": 1,
    }
