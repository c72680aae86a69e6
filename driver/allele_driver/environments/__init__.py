"""Where prompts and rewards come from: the plug-point that a run's user code fills.

An environment is a class, named in `spec.groups[].environment.path` as `module:Class` or by the name of an entry point
of group `allele.environments`. It is made once as `Class(tokenizer=…, **parameters)`, and lives in a worker process of
its own: it may hang, leak or crash without hurting the run.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The base model's tokenizer, as far as environments need it."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""


@dataclasses.dataclass(frozen=True)
class MemberView:
    """What an environment sees of a member."""

    name: str
    group: str
    index: int
    """Place in its group, from 0."""
    parameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text, or ids when the environment tokenises itself; `info` comes back with the completion."""

    text: str = ""
    ids: tuple[int, ...] = ()
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the policy answered."""

    ids: tuple[int, ...]
    """Exactly the ids that the engine returned, the stop token among them."""
    text: str
    finish: str
    """Why it ended: stop or length."""


@dataclasses.dataclass(frozen=True)
class Score:
    """A reward with numbers worth keeping, e.g. one per criterion."""

    reward: float
    details: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Environment(Protocol):
    """What a class must have. A plain text stands for a Prompt, a plain number for a Score."""

    def prompts(self, member: MemberView, rng: random.Random, n: int, held_out: bool) -> Sequence[Prompt | str]:
        """`n` prompts for a member. `rng` is the only source of chance, so that a replayed step draws the same ones;
        held-out prompts must never come back when `held_out` is False."""

    def score(self, member: MemberView, prompt: Prompt, completion: Completion) -> Score | float:
        """Reward of one completion."""
