"""The Arrow batch of a forward_backward, checked row by row.

Values that are not finite pass: they make that member's gradient not finite and so its step is skipped. What cannot be
computed at all (ids outside the vocabulary, lengths that differ) refuses the command, naming row and field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from allele.protocol.errors import InvalidRequest
from allele_trainer.model.config import BaseConfig


@dataclasses.dataclass(frozen=True)
class MemberSample:
    member: str
    prompt: list[int]
    completion: list[int]
    logprobs: list[float]
    advantage: float
    experts: npt.NDArray[np.int16] | None = None
    """`[inputs, layers, k]` that the rollout chose, −1 where it is not known."""

    @property
    def inputs(self) -> int:
        """Tokens that go into the model: the last one is only a target."""
        return len(self.prompt) + len(self.completion) - 1


def read_samples(table: pa.Table, *, members: Collection[str], config: BaseConfig) -> list[MemberSample]:
    """Rows of a TRAIN batch. Raises InvalidRequest for the first row that cannot be trained on."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name != "experts"}
    samples = []
    for row in range(table.num_rows):
        sample = MemberSample(**{name: values[row] for name, values in columns.items()})
        _check(sample, row, members=members, config=config)
        chosen = table.column("experts")[row]
        if chosen.is_valid:
            experts = _experts(np.asarray(chosen.values, np.int16), row, inputs=sample.inputs, config=config)
            sample = dataclasses.replace(sample, experts=experts)
        samples.append(sample)
    return samples


def _check(sample: MemberSample, row: int, *, members: Collection[str], config: BaseConfig) -> None:
    vocab, context = config.vocab, config.context
    if sample.member not in members:
        _refuse(row, "member", "one that was admitted", sample.member)
    for field in ("prompt", "completion"):
        ids = getattr(sample, field)
        if not ids or None in ids or min(ids) < 0 or max(ids) >= vocab:
            _refuse(row, field, f"at least one id, all in 0..{vocab - 1}", ids)
    if sample.logprobs is None or None in sample.logprobs or len(sample.logprobs) != len(sample.completion):
        _refuse(row, "logprobs", f"{len(sample.completion)} values, one per completion token", sample.logprobs)
    if sample.advantage is None:
        _refuse(row, "advantage", "a number", None)
    if len(sample.prompt) + len(sample.completion) > context:
        found = len(sample.prompt) + len(sample.completion)
        _refuse(row, "completion", f"at most {context} tokens with its prompt", found)


def _experts(flat: npt.NDArray[np.int16], row: int, *, inputs: int, config: BaseConfig) -> npt.NDArray[np.int16]:
    """Duplicates are refused: Megatron would scatter both onto one expert and lose the other's share in silence."""
    if config.experts is None:
        _refuse(row, "experts", "null, as the model has none", f"{flat.size} ids")
    shape = inputs, config.layers, config.experts.per_token
    if flat.size != np.prod(shape):
        _refuse(row, "experts", f"tokens − 1 × layers × experts per token = {shape} ids", f"{flat.size} ids")
    chosen = np.sort(flat.reshape(shape), axis=-1)
    known = chosen[..., -1] >= 0
    first_wrong = np.argwhere(
        np.where(
            known,
            (chosen[..., 0] < 0) | (chosen[..., -1] >= config.experts.count) | (np.diff(chosen) == 0).any(-1),
            (chosen != -1).any(-1),
        )
    )
    if first_wrong.size:
        token, layer = first_wrong[0].tolist()
        _refuse(
            row,
            f"experts of token {token} in layer {layer}",
            f"{shape[-1]} different ids in 0..{config.experts.count - 1}, or all −1",
            flat.reshape(shape)[token, layer].tolist(),
        )
    return flat.reshape(shape)


def _refuse(row: int, field: str, expected: str, found: Any) -> NoReturn:
    raise InvalidRequest(f"row {row}, {field}: expected {expected}, found {found!r}")
