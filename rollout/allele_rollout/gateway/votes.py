"""Which answer of several members wins: pure.

Answers that read the same are one side. A side with more votes wins; between equal ones the member that was surest of
its answer (the highest mean logprob) decides, and between equally sure ones the order in which they were named.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one member said; `logprob` is the mean over its tokens."""

    member: str
    text: str
    logprob: float


@dataclasses.dataclass(frozen=True)
class Side:
    """Members that gave the same answer, and its text in the words of the surest of them."""

    text: str
    members: tuple[str, ...]
    surest: Answer


def normalised(text: str) -> str:
    """The form in which answers are compared: compatible characters, case and white space make no difference."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def majority(answers: Sequence[Answer]) -> list[Side]:
    """All sides, the winning one first; `answers` in the order in which the members were named."""
    sides: dict[str, list[Answer]] = {}
    for answer in answers:
        sides.setdefault(normalised(answer.text), []).append(answer)
    found = []
    for side in sides.values():
        surest = max(side, key=lambda a: a.logprob)  # the first of equals
        found.append(Side(text=surest.text, members=tuple(a.member for a in side), surest=surest))
    return sorted(found, key=lambda s: (-len(s.members), -s.surest.logprob))  # stable: the first named of equals
