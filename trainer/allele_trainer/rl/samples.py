"""The Arrow batch of a forward_backward, checked row by row.

Values that are not finite pass: they make that member's gradient not finite and so its step is skipped. What cannot be
computed at all (ids outside the vocabulary, lengths that differ) refuses the command, naming row and field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import pyarrow as pa

from allele.protocol.errors import InvalidRequest


@dataclasses.dataclass(frozen=True)
class MemberSample:
    member: str
    prompt: list[int]
    completion: list[int]
    logprobs: list[float]
    advantage: float

    @property
    def inputs(self) -> int:
        """Tokens that go into the model: the last one is only a target."""
        return len(self.prompt) + len(self.completion) - 1


def read_samples(table: pa.Table, *, members: Collection[str], vocab: int, context: int) -> list[MemberSample]:
    """Rows of a TRAIN batch. Raises InvalidRequest for the first row that cannot be trained on."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    samples = []
    for row in range(table.num_rows):
        sample = MemberSample(**{name: values[row] for name, values in columns.items()})
        _check(sample, row, members=members, vocab=vocab, context=context)
        samples.append(sample)
    return samples


def _check(sample: MemberSample, row: int, *, members: Collection[str], vocab: int, context: int) -> None:
    def refuse(field: str, expected: str, found: Any) -> None:
        raise InvalidRequest(f"row {row}, {field}: expected {expected}, found {found!r}")

    if sample.member not in members:
        refuse("member", "one that was admitted", sample.member)
    for field in ("prompt", "completion"):
        ids = getattr(sample, field)
        if not ids or None in ids or min(ids) < 0 or max(ids) >= vocab:
            refuse(field, f"at least one id, all in 0..{vocab - 1}", ids)
    if sample.logprobs is None or None in sample.logprobs or len(sample.logprobs) != len(sample.completion):
        refuse("logprobs", f"{len(sample.completion)} values, one per completion token", sample.logprobs)
    if sample.advantage is None:
        refuse("advantage", "a number", None)
    if len(sample.prompt) + len(sample.completion) > context:
        refuse("completion", f"at most {context} tokens with its prompt", len(sample.prompt) + len(sample.completion))
