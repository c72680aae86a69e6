"""What a loss is given and what it gives: flat vectors over completion tokens, and which sequence each belongs to.

Every loss is a pure function of these. Sums run within a sequence or a pair and never across, in the order of tokens,
so that the bits of a member do not depend on what else is in the batch. On a CPU only functions whose kernels treat a
vector's tail as its middle may be used: exp, log, log1p; torch.sigmoid, for one, rounds the last elements differently.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from allele.protocol.losses import Level

LOG_RATIO_BOUND = 20.0
"""Of the logarithm of a ratio of whole sequences: beyond it the ratio stays e^±20, without gradient, as in verl."""


@dataclasses.dataclass(frozen=True)
class Sequences:
    """n tokens in s sequences of `counts` tokens, those of a sequence side by side; losses of single tokens do not ask
    for more than that."""

    counts: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def index(self) -> Tensor:
        """`[n]` sequence of each token, ascending from 0."""
        counts = torch.tensor(self.counts)
        return torch.arange(counts.numel()).repeat_interleave(counts).to(self.device)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """`[s]` tokens of each sequence, in the dtype of the logprobs."""
        return torch.tensor(self.counts, dtype=self.dtype).to(self.device)

    def sums(self, values: Tensor) -> Tensor:
        """`[n]` → `[s]`"""
        return values.new_zeros(self.lengths.numel()).index_add(0, self.index, values)

    def spread(self, values: Tensor) -> Tensor:
        """`[s]` → `[n]`"""
        return values.index_select(0, self.index)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher's most likely tokens at each place, and what the student thinks of them: `[n, k]` each."""

    logprobs: Tensor
    student: Tensor
    """With gradient."""
    complete: bool
    """Whether the k tokens are the whole vocabulary."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Completion tokens under one specification. `[n]` each; only `logprobs` (and teacher.student) have a gradient."""

    logprobs: Tensor
    sequences: Sequences
    rollout: Tensor | None = None
    """The sampling policy's logprobs, as recorded."""
    advantages: Tensor | None = None
    reference: Tensor | None = None
    """Logprobs of the base or of another reference policy."""
    teacher: Teacher | None = None


@dataclasses.dataclass(frozen=True)
class Terms:
    """`loss` `[n]`: a value per token, not yet weighted. The rest, `[n]` without gradient, is for the report."""

    loss: Tensor
    ratio: Tensor | None = None
    clipped: Tensor | None = None
    rejected: Tensor | None = None
    kl: Tensor | None = None
    ranked: Tensor | None = None
    """1 on the tokens of pairs that are ranked as told."""


class MissingInput(Exception):
    """A loss was not given what its specification asks for: a fault of the caller."""


def given(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        raise MissingInput(f"{what}: expected a value for each token, found none")
    return value


def ratio(log_ratio: Tensor, sequences: Sequences, level: Level) -> Tensor:
    """`[n]` log-ratios → `[n]` ratios at a level, the same for all tokens of a sequence unless it is Token."""
    if level == "Token":
        return log_ratio.exp()
    total = sequences.sums(log_ratio)
    if level == "Geometric":
        total = total / sequences.lengths
    return sequences.spread(total.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp())


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), without overflow."""
    return x.clamp(min=0) + torch.log1p((-x.abs()).exp())
