"""The members that every layout trains: ranks, targets, scalings, clips and rates of their own, from random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from allele.format import AdapterShape
from allele.protocol import commands as c
from tests.trainer.trainer_parts import ALL, Example, adapter, examples

STEPS = 5
SAVED = 3
"""Steps after which rows are saved, for another layout to go on."""

MAX_TOKENS = 120
"""Of a micro-batch: two or three members each, so that ranks and parts of a sequence begin in the midst of one."""

VOCAB = 97
LAYERS = 2
SPECS = {
    "all": adapter(rank=8, alpha=16),
    "same-shape": adapter(rank=8, alpha=4, scaling="RankStabilised"),
    "attention": adapter(rank=4, alpha=8, targets=("q_proj", "v_proj")),
    "rank-two": adapter(rank=2, alpha=8, targets=("up_proj", "o_proj")),
    "rank-one": adapter(rank=1, alpha=2, targets=("k_proj", "down_proj")),
}
RULES = {m: c.OptimizerSpec(clip=0.05 if i % 2 else 100.0, weight_decay=0.1 * (i % 3)) for i, m in enumerate(SPECS)}
RATES = {m: 1e-4 * (i % 4 + 1) for i, m in enumerate(SPECS)}

SIZES: dict[str, dict[str, object]] = {
    "qwen3": {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "tie_word_embeddings": True},
    "qwen3_moe": {
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
"""Base → its sizes; 97 ids do not divide over tensor ranks."""


def shape(config: dict[str, object], member: str) -> AdapterShape:
    return AdapterShape.from_model(config, rank=SPECS[member].rank, targets=SPECS[member].targets)


def first_weights(found: AdapterShape, member: str) -> np.ndarray:
    """A and B both random: no gradient of the first step is zero."""
    seed = list(SPECS).index(member)
    return np.random.default_rng(seed).normal(0, 0.05, found.numel).astype(np.float32)


REPLAYED = ("all", "rank-one")
"""Members whose rollouts say which experts they used, where the base has experts; not for every token."""


def samples(step: int, *, model: str) -> Sequence[Example]:
    found = examples(SPECS, each=5, vocab=VOCAB, seed=step)
    return [_routed(e, seed=step) if model == "qwen3_moe" and e.member in REPLAYED else e for e in found]


def _routed(example: Example, *, seed: int) -> Example:
    """Random experts, different ones for each token and layer; every fifth token's are not known."""
    rng = np.random.default_rng([seed, *example.prompt, *example.completion])
    experts = rng.random((example.inputs, LAYERS, 4)).argsort(-1)[..., :2]
    experts[::5] = -1
    return dataclasses.replace(example, experts=experts.ravel().tolist())


assert set(SPECS["all"].targets) == set(ALL)
