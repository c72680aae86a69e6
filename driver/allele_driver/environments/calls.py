"""What goes between the driver and an environment's worker process: pickled frames over its stdin and stdout.

Both ends are our own code on one machine, in one pod; pickle never crosses a socket.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from typing import Any, BinaryIO, Literal

from allele_driver.environments import Lesson, MemberView, Prompt, Score

LENGTH = struct.Struct(">I")


@dataclasses.dataclass(frozen=True)
class Start:
    path: str
    parameters: dict[str, Any]
    tokenizer: str
    """Content of tokenizer.json."""
    stop_token_ids: tuple[int, ...]
    methods: tuple[str, ...] = ()
    """What the class must have beside prompts and score."""


@dataclasses.dataclass(frozen=True)
class Started:
    code_digest: str
    data_digest: str


@dataclasses.dataclass(frozen=True)
class Draw:
    member: MemberView
    seed: int
    n: int
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Drawn:
    prompts: tuple[Prompt, ...]
    """Each with ids."""


@dataclasses.dataclass(frozen=True)
class Give:
    """Answers or pairs."""

    member: MemberView
    seed: int
    n: int
    what: Literal["answers", "pairs"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt and what was said to it, in ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    reference: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Given:
    texts: tuple[Text, ...]
    """Of pairs, two for each: the chosen one first."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """Score a completion, or teach about it with `teach` tokens at each place."""

    member: MemberView
    prompt: Prompt
    ids: tuple[int, ...]
    finish: str
    teach: int = 0


@dataclasses.dataclass(frozen=True)
class Failed:
    """User code raised, or returned something else than it should."""

    reason: str
    traceback: str


Answer = Started | Drawn | Given | Score | Lesson | Failed
Call = Start | Draw | Give | Judge


def dump(value: Call | Answer) -> bytes:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def load(data: bytes) -> Any:
    """The value of a frame without its length."""
    return pickle.loads(data)


def read(stream: BinaryIO) -> Any:
    """The next value; raises EOFError when the other end is gone."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    return load(stream.read(LENGTH.unpack(head)[0]))
