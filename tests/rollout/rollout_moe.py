"""A small base with experts: all weights random, a long context without an end token, a template that shows tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allele.format import AdapterShape, export_peft
from tests.rollout.rollout_parts import ALPHA, BASE

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS, EXPERTS, CHOSEN = 3, 8, 2
CONTEXT = 16384
"""So long that a request is still running when a test gives it up."""
TEMPLATE = (
    "{% for t in tools or [] %}{{ t['function']['name'] }}{% endfor %}{% for m in messages %}{{ m['content'] }}"
    "{% endfor %}"
)


def write_base(folder: Path) -> Path:
    """The tokens of the examples' base, other weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    model.save_pretrained(folder)
    shutil.copy(BASE / "tokenizer.json", folder)
    tokenizer = json.loads((BASE / "tokenizer_config.json").read_text())
    tokenizer |= {"chat_template": TEMPLATE, "model_max_length": CONTEXT, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def shape_of(base: Path) -> AdapterShape:
    return AdapterShape.from_model(json.loads((base / "config.json").read_text()), rank=8, targets=TARGETS)


def router_choices(base: Path, adapter: bytes | None, tokens: Sequence[int], folder: Path) -> list[Any]:
    """Sets of experts by Hugging Face's routers in float32: `[tokens − 1][layers]`, as an engine has them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        shape = shape_of(base)
        export_peft(adapter, folder, shape=shape, scale=ALPHA / shape.rank, base_name="moe")
        model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([list(tokens[:-1])]), output_router_logits=True).router_logits
    chosen = [layer.topk(CHOSEN, dim=-1).indices.tolist() for layer in logits]
    return [[set(layer[t]) for layer in chosen] for t in range(len(tokens) - 1)]
