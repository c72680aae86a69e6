"""A small Qwen3 and the shape of its adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from allele.format import AdapterShape

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }


@pytest.fixture(scope="session")
def shape(config: dict[str, Any]) -> AdapterShape:
    return AdapterShape.from_model(config, rank=4, targets=TARGETS)


@pytest.fixture
def row(shape: AdapterShape) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape.numel).astype("<f4")
