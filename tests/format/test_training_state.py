"""A state file resumes training exactly, and only for the shape it was saved from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from allele.format import AdapterShape, ShapeMismatch, StateShape


def test_weights_moments_and_step_come_back_bit_exactly(shape: AdapterShape, row: np.ndarray) -> None:
    layout = StateShape(shape)
    packed = layout.pack(weights=row, exp_avg=row * 2, exp_avg_sq=row**2, step=41)
    state = layout.unpack(packed)
    assert (state.weights == row).all() and (state.exp_avg == row * 2).all() and (state.exp_avg_sq == row**2).all()
    assert state.step == 41
    assert len(packed) == len(layout.header) + layout.nbytes


def test_the_safetensors_library_reads_it(shape: AdapterShape, row: np.ndarray) -> None:
    loaded = safetensors.numpy.load(StateShape(shape).pack(weights=row, exp_avg=row, exp_avg_sq=row, step=3))
    assert loaded["step"].tolist() == [3]
    assert (loaded["exp_avg_sq"] == row).all()


def test_the_state_of_another_shape_is_refused(shape: AdapterShape, config: dict[str, Any], row: np.ndarray) -> None:
    packed = StateShape(shape).pack(weights=row, exp_avg=row, exp_avg_sq=row, step=1)
    larger = AdapterShape.from_model(config, rank=8, targets=shape.targets)
    with pytest.raises(ShapeMismatch, match=rf"weights: expected F32 \[{larger.numel}\], found F32 \[{shape.numel}\]"):
        StateShape(larger).unpack(packed)


def test_a_shape_of_equal_size_but_other_modules_is_refused(config: dict[str, Any]) -> None:
    square = config | {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4}
    q, o = (AdapterShape.from_model(square, rank=4, targets=[t]) for t in ("q_proj", "o_proj"))
    assert q.numel == o.numel
    row = np.zeros(q.numel, dtype="<f4")
    with pytest.raises(ShapeMismatch, match="metadata"):
        StateShape(o).unpack(StateShape(q).pack(weights=row, exp_avg=row, exp_avg_sq=row, step=1))


def test_a_short_moment_is_refused(shape: AdapterShape, row: np.ndarray) -> None:
    with pytest.raises(ShapeMismatch, match="exp_avg_sq"):
        StateShape(shape).pack(weights=row, exp_avg=row, exp_avg_sq=row[:-1], step=1)
