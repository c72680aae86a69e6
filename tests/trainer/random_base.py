"""Small bases with every weight random, norms included, as Hugging Face folders."""

from __future__ import annotations

import pathlib

import torch
import transformers

_MODELS = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}


def write_base(folder: pathlib.Path, *, model: str = "qwen3", **sizes: object) -> pathlib.Path:
    config = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "attention_bias": False,
    }
    make_config, make_model = _MODELS[model]
    torch.manual_seed(0)
    made = make_model(make_config(**(config | sizes)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.08 * noise)
    made.save_pretrained(folder)
    return folder
