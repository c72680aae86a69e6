"""The Arrow batch of a forward_backward, checked row by row.

Values that are not finite pass: they make that member's gradient not finite and so its step is skipped. What cannot be
computed at all (ids outside the vocabulary, lengths that differ, a loss without its columns) refuses the command,
naming row and field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from allele.protocol.errors import InvalidRequest
from allele.protocol.losses import DistillationLoss, LossSpec, PolicyLoss, PreferenceLoss
from allele_trainer.model.config import BaseConfig


@dataclasses.dataclass(frozen=True)
class MemberSample:
    """One row; fields as at `allele.protocol.samples.TRAIN`."""

    member: str
    loss: int
    prompt: list[int]
    completion: list[int]
    logprobs: list[float] | None = None
    advantage: float | None = None
    pair: int | None = None
    reference: list[float] | None = None
    teacher_prompt: list[int] | None = None
    teacher_ids: list[int] | None = None
    teacher_logprobs: list[float] | None = None
    experts: npt.NDArray[np.int16] | None = None
    """`[inputs, layers, k]`."""

    @property
    def inputs(self) -> int:
        """Tokens that go into the model: the last one is only a target."""
        return len(self.prompt) + len(self.completion) - 1


def read_samples(
    table: pa.Table, *, losses: Sequence[LossSpec], members: Collection[str], config: BaseConfig
) -> list[MemberSample]:
    """Rows of a TRAIN batch. Raises InvalidRequest for the first row that cannot be trained on."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name != "experts"}
    chosen: dict[str, int] = {}
    samples = []
    for number in range(table.num_rows):
        sample = MemberSample(**{name: values[number] for name, values in columns.items()})
        row = _Row(number, sample, config)
        row.tokens(members)
        row.loss(losses, chosen)
        experts = table.column("experts")[number]
        if experts.is_valid:
            sample = dataclasses.replace(sample, experts=row.experts(np.asarray(experts.values, np.int16)))
        samples.append(sample)
    _check_pairs(samples, losses)
    return samples


@dataclasses.dataclass(frozen=True)
class _Row:
    number: int
    sample: MemberSample
    config: BaseConfig

    def tokens(self, members: Collection[str]) -> None:
        sample = self.sample
        if sample.member not in members:
            self._refuse("member", "one that was admitted", sample.member)
        self._ids("prompt", sample.prompt)
        self._ids("completion", sample.completion)
        self._fits("completion", sample.prompt)

    def loss(self, losses: Sequence[LossSpec], chosen: dict[str, int]) -> None:
        """That the row names one of `losses`, the one its member has in earlier rows, and has what that needs."""
        sample = self.sample
        if not 0 <= sample.loss < len(losses):
            self._refuse("loss", f"a place in losses, 0..{len(losses) - 1}", sample.loss)
        if chosen.setdefault(sample.member, sample.loss) != sample.loss:
            self._refuse("loss", f"{chosen[sample.member]} as in other rows of {sample.member}", sample.loss)
        spec, n = losses[sample.loss], len(sample.completion)
        if isinstance(spec, PolicyLoss):
            self._numbers("logprobs", sample.logprobs, n, "one per completion token")
            if sample.advantage is None:
                self._refuse("advantage", "a number", None)
        if isinstance(spec, PreferenceLoss) and sample.reference is not None:
            self._numbers("reference", sample.reference, n, "one per completion token")
        if isinstance(spec, DistillationLoss):
            self._teacher(spec)

    def _teacher(self, spec: DistillationLoss) -> None:
        sample, n = self.sample, len(self.sample.completion)
        if spec.teacher == "Base":
            if sample.teacher_ids is not None:
                self._refuse("teacher_ids", "none: the loss says that the base teaches", sample.teacher_ids[:8])
            if sample.teacher_prompt is not None:
                self._ids("teacher_prompt", sample.teacher_prompt)
                self._fits("teacher_prompt", sample.teacher_prompt)
            return
        if spec.top_k > self.config.vocab:
            self._refuse("loss", f"top_k of at most {self.config.vocab}, the vocabulary", spec.top_k)
        self._ids("teacher_ids", sample.teacher_ids)
        for field in ("teacher_ids", "teacher_logprobs"):
            self._numbers(field, getattr(sample, field), n * spec.top_k, f"{spec.top_k} for each completion token")
        ids = np.sort(np.array(sample.teacher_ids).reshape(n, spec.top_k), axis=1)
        if (ids[:, 1:] == ids[:, :-1]).any():
            self._refuse("teacher_ids", "different ids for a completion token", "one of them twice")

    def experts(self, flat: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
        """Duplicates are refused: Megatron would scatter both onto one expert and lose the other's share in silence."""
        experts = self.config.experts
        if experts is None:
            self._refuse("experts", "null, as the model has none", f"{flat.size} ids")
        shape = self.sample.inputs, self.config.layers, experts.per_token
        if flat.size != np.prod(shape):
            self._refuse("experts", f"tokens − 1 × layers × experts per token = {shape} ids", f"{flat.size} ids")
        chosen = np.sort(flat.reshape(shape), axis=-1)
        known = chosen[..., -1] >= 0
        first_wrong = np.argwhere(
            np.where(
                known,
                (chosen[..., 0] < 0) | (chosen[..., -1] >= experts.count) | (np.diff(chosen) == 0).any(-1),
                (chosen != -1).any(-1),
            )
        )
        if first_wrong.size:
            token, layer = first_wrong[0].tolist()
            self._refuse(
                f"experts of token {token} in layer {layer}",
                f"{shape[-1]} different ids in 0..{experts.count - 1}, or all −1",
                flat.reshape(shape)[token, layer].tolist(),
            )
        return flat.reshape(shape)

    def _ids(self, field: str, ids: Sequence[int] | None) -> None:
        if not ids or None in ids or min(ids) < 0 or max(ids) >= self.config.vocab:
            self._refuse(field, f"at least one id, all in 0..{self.config.vocab - 1}", ids)

    def _fits(self, field: str, prompt: Sequence[int]) -> None:
        length = len(prompt) + len(self.sample.completion)
        if length > self.config.context:
            self._refuse(field, f"at most {self.config.context} tokens of prompt and completion", length)

    def _numbers(self, field: str, values: Sequence[float] | None, n: int, which: str) -> None:
        if values is None or None in values or len(values) != n:
            self._refuse(field, f"{n} values, {which}", values)

    def _refuse(self, field: str, expected: str, found: Any) -> NoReturn:
        raise InvalidRequest(f"row {self.number}, {field}: expected {expected}, found {found!r:.200}")


def _check_pairs(samples: Sequence[MemberSample], losses: Sequence[LossSpec]) -> None:
    """Rows of a preference come two by two."""
    first: int | None = None
    for row, sample in enumerate(samples):
        paired = isinstance(losses[sample.loss], PreferenceLoss)
        if first is not None:
            key = (samples[first].member, samples[first].pair)
            if (sample.member, sample.pair) != key:
                raise InvalidRequest(
                    f"row {row}, pair: expected the second row of pair {key[1]} of {key[0]}, found pair {sample.pair} "
                    f"of {sample.member}"
                )
            first = None
        elif paired and sample.pair is None:
            raise InvalidRequest(f"row {row}, pair: expected a number that two rows side by side have, found None")
        elif paired:
            first = row
    if first is not None:
        raise InvalidRequest(f"row {first}, pair: expected a second row after it, found the end of the batch")
