"""Builds the frozen model; adapters hang on its linears and find their rows by the batch's plan."""

from __future__ import annotations

import dataclasses
import pathlib

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from allele_trainer.lora.linear import AdaptedLinear, concatenated, interleaved
from allele_trainer.model import cpu
from allele_trainer.model.batch import PackedBatch
from allele_trainer.model.config import BaseConfig, read_config, transformer_config
from allele_trainer.model.convert import load_base
from allele_trainer.model.packed import (
    PackedAttention,
    PackedGPTModel,
    PackedLayer,
    PackedRotary,
    SequenceParallelRMSNorm,
)


@dataclasses.dataclass(frozen=True)
class BaseModel:
    config: BaseConfig
    gpt: PackedGPTModel
    device: torch.device

    def logits(self, batch: PackedBatch) -> Tensor:
        """fp32 `[R, vocab]` of the batch's rows."""
        out = self.gpt(batch.tokens[None], batch.positions[None], None, packed_seq_params=batch)
        return out[0].float()

    def logprobs(self, batch: PackedBatch, targets: Tensor) -> Tensor:
        """Log-probability of `targets` `[n]` under the first n rows → `[n]`; the rest of the rows is padding."""
        logits = self.logits(batch)[: targets.numel()]
        return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def build(folder: pathlib.Path) -> BaseModel:
    """Model of a Hugging Face folder whose files were checked when they were fetched."""
    on_cpu = not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    _initialise(on_cpu)
    config = read_config(folder)
    gpt = PackedGPTModel(
        config=transformer_config(config, cpu=on_cpu),
        transformer_layer_spec=_spec(config),
        vocab_size=config.vocab,
        max_sequence_length=config.context,
        share_embeddings_and_output_weights=config.tied,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
    )
    gpt.rotary_pos_emb = PackedRotary(gpt.rotary_pos_emb)
    load_base(gpt, folder, config=config)
    gpt.requires_grad_(False).to(device)
    # Adapters are buffers, so the graph starts at the embedding; without this no layer would have a gradient.
    gpt.embedding.register_forward_hook(lambda _module, _args, out: out.requires_grad_(torch.is_grad_enabled()))
    _adapt(gpt, config)
    return BaseModel(config, gpt, device)


def _initialise(on_cpu: bool) -> None:
    if on_cpu:
        cpu.install()
    if not dist.is_initialized():
        # A store in this process: one rank needs no port.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo" if on_cpu else "nccl", store=store, rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1, inference_rng_tracker=on_cpu)


def _spec(config: BaseConfig) -> TransformerBlockSubmodules:
    layer: ModuleSpec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    layer.module = PackedLayer
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention = parts.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    attention.core_attention = PackedAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * config.layers, layer_norm=SequenceParallelRMSNorm)


def _adapt(gpt: PackedGPTModel, config: BaseConfig) -> None:
    for layer in gpt.decoder.layers:
        index = layer.layer_number - 1
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_qkv = AdaptedLinear(
            attention.linear_qkv,
            site=(index, "linear_qkv"),
            outputs=config.qkv_outputs,
            assemble=interleaved(config.groups),
        )
        attention.linear_proj = AdaptedLinear(
            attention.linear_proj, site=(index, "linear_proj"), outputs=(config.hidden,), assemble=concatenated
        )
        mlp.linear_fc1 = AdaptedLinear(
            mlp.linear_fc1, site=(index, "linear_fc1"), outputs=(config.ffn, config.ffn), assemble=concatenated
        )
        mlp.linear_fc2 = AdaptedLinear(
            mlp.linear_fc2, site=(index, "linear_fc2"), outputs=(config.hidden,), assemble=concatenated
        )
