"""Builds this rank's part of the frozen model; adapters hang on its linears and find their rows by the batch's plan."""

from __future__ import annotations

import pathlib

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from allele_trainer.lora.linear import AdaptedLinear, crossing, outputs
from allele_trainer.model.attention import PackedAttention
from allele_trainer.model.config import BaseConfig, check_layout, read_config, transformer_config
from allele_trainer.model.convert import load_base, padded_vocab
from allele_trainer.model.experts import PackedMoELayer
from allele_trainer.model.norm import PackedRMSNorm
from allele_trainer.model.packed import PackedGPTModel, PackedLayer, SwiGLU
from allele_trainer.model.run import BaseModel
from allele_trainer.parallel import Ranks, initialise

__all__ = ["BaseModel", "build"]


def build(folder: pathlib.Path, ranks: Ranks | None = None) -> BaseModel:
    """This rank's part of the model of a Hugging Face folder whose files were checked when they were fetched.

    Raises UnsupportedBase for a folder that would be computed wrongly, UnsupportedLayout where it does not divide.
    """
    ranks = ranks or initialise()
    config, layout, place = read_config(folder), ranks.layout, ranks.place
    check_layout(config, layout)
    on_cpu = ranks.device.type == "cpu"
    gpt = PackedGPTModel(
        config=transformer_config(config, layout, cpu=on_cpu),
        transformer_layer_spec=_spec(config, layers=config.layers // layout.pp),
        vocab_size=padded_vocab(config, place),
        max_sequence_length=config.context,
        pre_process=place.pp_rank == 0,
        post_process=place.pp_rank == layout.pp - 1,
        # Each stage reads what it needs: Megatron would sum the two copies of a tied embedding over the stages.
        share_embeddings_and_output_weights=config.tied and layout.pp == 1,
        frequencies=config.rotary_frequencies().to(ranks.device),
    )
    load_base(gpt, folder, config=config, place=place)
    gpt.requires_grad_(False).to(ranks.device)
    if gpt.pre_process and (layout.recompute or layout.pp > 1 or layout.ep > 1):
        # The graph starts at the first adapter. But what recomputes a layer or sends gradients to another rank wants
        # hidden states with a gradient from the first layer on, and without it gives none in silence.
        gpt.embedding.register_forward_hook(lambda _module, _args, out: out.requires_grad_(torch.is_grad_enabled()))
    _adapt(gpt, config, ranks)
    return BaseModel(config, gpt, ranks)


def _spec(config: BaseConfig, *, layers: int) -> TransformerBlockSubmodules:
    layer: ModuleSpec = get_gpt_layer_local_spec(qk_layernorm=config.qk_norm, normalization="RMSNorm")
    layer.module = PackedLayer
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = PackedRMSNorm
    attention = parts.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = PackedRMSNorm if config.qk_norm else IdentityOp
    attention.core_attention = IdentityOp
    parts.self_attention.module = PackedAttention
    if config.experts:
        parts.mlp = PackedMoELayer
    else:
        parts.mlp.submodules.activation_func = SwiGLU
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=PackedRMSNorm)


def _adapt(gpt: PackedGPTModel, config: BaseConfig, ranks: Ranks) -> None:
    tp = ranks.layout.tp
    qkv, ffn = tuple(n // tp for n in config.qkv_outputs), config.ffn // tp
    outward, inward = (
        crossing(by_inputs=by_inputs, tp=tp, sequence_parallel=ranks.sequence_parallel) for by_inputs in (False, True)
    )
    for layer in gpt.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        linears = [
            (attention, "linear_qkv", outputs("linear_qkv", qkv, groups=config.groups // tp), outward),
            (attention, "linear_proj", outputs("linear_proj", (config.hidden,)), inward),
        ]
        if not config.experts:
            linears += [
                (mlp, "linear_fc1", outputs("linear_fc1", (ffn, ffn)), outward),
                (mlp, "linear_fc2", outputs("linear_fc2", (config.hidden,)), inward),
            ]
        for module, name, places, way in linears:
            site = (layer.layer_number - 1, name)
            setattr(module, name, AdaptedLinear(getattr(module, name), site=site, outputs=places, crossing=way))
