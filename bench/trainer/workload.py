"""What all contenders train: a random Qwen3, and GRPO samples of N members."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch
import transformers
from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, RATE, CLIP = 8, 16.0, 1e-4, 1.0
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclasses.dataclass(frozen=True)
class Workload:
    """`tokens` per member in sequences of equal length, a quarter of each the prompt."""

    model: str
    members: int
    tokens: int
    longest: int = 32
    """Tokens of a sequence; members with fewer have one shorter sequence."""
    device: str = "cpu"

    @property
    def key(self) -> str:
        return f"{self.model} N{self.members} T{self.tokens}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def length(self) -> int:
        return min(self.tokens, self.longest)

    @property
    def prompt(self) -> int:
        return self.length // 4

    def ids(self) -> Tensor:
        """`[members, sequences, length]`"""
        shape = (self.members, self.tokens // self.length, self.length)
        return torch.from_numpy(np.random.default_rng(0).integers(0, 96, shape))

    def advantages(self) -> Tensor:
        """`[members, sequences]`"""
        shape = (self.members, self.tokens // self.length)
        return torch.from_numpy(np.random.default_rng(1).normal(size=shape).astype(np.float32))

    def logprobs(self) -> Tensor:
        """The rollout's, `[members, sequences, length − prompt]`; near those of a random model."""
        shape = (self.members, self.tokens // self.length, self.length - self.prompt)
        noise = np.random.default_rng(2).normal(scale=0.1, size=shape)
        return torch.from_numpy((noise - np.log(96)).astype(np.float32))


MODELS: dict[str, dict[str, int]] = {
    "h64": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "h128": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32},
    "h256": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    "0.6B": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "4B": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
"""Sizes of Qwen3 models; small ones have 96 ids, two layers and four heads over two key-value groups."""


def write_base(folder: pathlib.Path, *, model: str, device: str = "cpu") -> pathlib.Path:
    """A Qwen3 with random weights, as a Hugging Face folder; made where it takes least time."""
    small = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen3Config(
        **(small | MODELS[model]),
        max_position_embeddings=4096,
        tie_word_embeddings=model in ("0.6B", "4B"),
        attention_bias=False,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device(device):
        transformers.Qwen3ForCausalLM(config).to(config.dtype).save_pretrained(folder)
    return folder


def grpo(logits: Tensor, ids: Tensor, old: Tensor, advantages: Tensor, *, prompt: int) -> Tensor:
    """Mean over completion tokens of −min(ρA, clip(ρ)A); logits `[B, L, vocab]`, ids `[B, L]`, the rest `[B, …]`."""
    targets = ids[:, prompt:]
    found = torch.log_softmax(logits[:, prompt - 1 : -1], -1).gather(2, targets[..., None])[..., 0]
    ratio = (found - old).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages[:, None])
    return -gain.mean(dim=1)
