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
LONGEST = 32
"""Tokens of a sequence; members with fewer have one shorter sequence."""
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclasses.dataclass(frozen=True)
class Workload:
    """`tokens` per member in sequences of equal length, a quarter of each the prompt."""

    hidden: int
    members: int
    tokens: int

    @property
    def key(self) -> str:
        return f"h{self.hidden} N{self.members} T{self.tokens}"

    @property
    def length(self) -> int:
        return min(self.tokens, LONGEST)

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


def write_base(folder: pathlib.Path, *, hidden: int) -> pathlib.Path:
    """A Qwen3 of two layers with random weights, as a Hugging Face folder."""
    config = transformers.Qwen3Config(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        attention_bias=False,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def grpo(logits: Tensor, ids: Tensor, old: Tensor, advantages: Tensor, *, prompt: int) -> Tensor:
    """Mean over completion tokens of −min(ρA, clip(ρ)A); logits `[B, L, vocab]`, ids `[B, L]`, the rest `[B, …]`."""
    targets = ids[:, prompt:]
    found = torch.log_softmax(logits[:, prompt - 1 : -1], -1).gather(2, targets[..., None])[..., 0]
    ratio = (found - old).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages[:, None])
    return -gain.mean(dim=1)
