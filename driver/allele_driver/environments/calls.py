"""What goes between the driver and an environment's worker process: pickled frames over its stdin and stdout.

Both ends are our own code on one machine, in one pod; pickle never crosses a socket.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from typing import Any, BinaryIO

from allele_driver.environments import MemberView, Prompt, Score

LENGTH = struct.Struct(">I")


@dataclasses.dataclass(frozen=True)
class Start:
    path: str
    parameters: dict[str, Any]
    tokenizer: str
    """Content of tokenizer.json."""
    stop_token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Started:
    code_digest: str


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
class Judge:
    member: MemberView
    prompt: Prompt
    ids: tuple[int, ...]
    finish: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """User code raised, or returned something else than it should."""

    reason: str
    traceback: str


Answer = Started | Drawn | Score | Failed
Call = Start | Draw | Judge


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
