"""Where prompts and rewards come from: the plug-point that a run's user code fills.

An environment is a class, named in `spec.groups[].environment.path` as `module:Class` or by the name of an entry point
of group `allele.environments`. It is made once as `Class(tokenizer=…, **parameters)`, and lives in a worker process of
its own: it may hang, leak or crash without hurting the run. Its attribute `data_digest`, if it has one, goes into the
provenance of what it taught: the sha256 of a data set, say.

Every environment has `prompts` and `score`: held-out evaluation and the probes of a revision need them. What else it
must have depends on the run's algorithm:

    SFT                                 answers    what a member should have said
    DPO                                 pairs      two answers, the first one better
    Distillation, teacher Environment   teach      a teacher's probabilities of what the member said
    Distillation, teacher Base          nothing; a Prompt's `teacher` is what the base sees in place of the prompt
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
    """All but `algorithm` and `optimizer`, which the driver reads."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text, or ids when the environment tokenises itself; `info` comes back with the completion.

    `teacher`, text or `teacher_ids`, is the prompt under which the base teaches in context distillation.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher: str = ""
    teacher_ids: tuple[int, ...] = ()


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


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer that was written and not sampled. Text: its tokens and then the first stop token. Ids: exactly these.

    `reference`: log-probabilities of the ids under DPO's reference policy; empty: the base is the reference.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    reference: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a member should say to a prompt."""

    prompt: Prompt | str
    said: Said | str


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, the first one better."""

    prompt: Prompt | str
    chosen: Said | str
    rejected: Said | str


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A teacher's most likely tokens at each place of a completion, topK of them, and their log-probabilities.

    Flat, one place after the other: topK times the length of the completion. The ids of a place are all different.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Environment(Protocol):
    """What every class must have. A plain text stands for a Prompt, a plain number for a Score."""

    def prompts(self, member: MemberView, rng: random.Random, n: int, held_out: bool) -> Sequence[Prompt | str]:
        """`n` prompts for a member. `rng` is the only source of chance, so that a replayed step draws the same ones;
        held-out prompts must never come back when `held_out` is False."""

    def score(self, member: MemberView, prompt: Prompt, completion: Completion) -> Score | float:
        """Reward of one completion."""


class Answers(Environment, Protocol):
    """For SFT."""

    def answers(self, member: MemberView, rng: random.Random, n: int) -> Sequence[Answer]:
        """`n` answers to learn; `rng` is the only source of chance. Plain texts stand for a Prompt and for Said."""


class Pairs(Environment, Protocol):
    """For DPO."""

    def pairs(self, member: MemberView, rng: random.Random, n: int) -> Sequence[Pair]:
        """`n` pairs to learn from; `rng` is the only source of chance."""


class Teaches(Environment, Protocol):
    """For Distillation with teacher Environment."""

    def teach(self, member: MemberView, prompt: Prompt, completion: Completion) -> Lesson:
        """What the teacher thinks at each place of a completion of the member."""
