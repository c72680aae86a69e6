"""64 private preferences over one small task: only a member's own adapter can know which one is its own.

A prompt is five distinct letters of a-p and `=`, e.g. `kbdac=`. The answer is sign, letters, sign, 7 characters and
the stop token. A preference says in which order the letters come, which sign surrounds them, and in which case they
are: 4 x 4 x 4. The reward is a third for each of the three that is right. The prompt carries no hint of the member.

`*abcdk*` is right for sort, `*`, lower; `|CADBK|` for reverse, `|`, upper.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

LETTERS = "abcdefghijklmnop"
LENGTH = 5

ORDERS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "sort-desc": lambda word: "".join(sorted(word, reverse=True)),
}
SIGNS = ("*", "-", "|", "~")
CASES: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "first": lambda word: word[:1].upper() + word[1:].lower(),
    "alternating": lambda word: "".join(c.upper() if i % 2 else c.lower() for i, c in enumerate(word)),
}


class Preference(NamedTuple):
    """What one member likes."""

    order: str
    sign: str
    case: str

    def answer(self, word: str) -> str:
        """The one string with reward 1."""
        return self.sign + CASES[self.case](ORDERS[self.order](word)) + self.sign

    def reward(self, word: str, text: str) -> float:
        """A third for each property that `text` has; letters, signs and case are judged one without the others."""
        letters = "".join(c for c in text if c.isalpha())
        right = (
            letters.lower() == ORDERS[self.order](word),
            len(text) == LENGTH + 2 and text[0] == self.sign == text[-1],
            len(letters) == LENGTH and letters == CASES[self.case](letters),
        )
        return sum(right) / 3


def preference_of(index: int) -> Preference:
    """The preference of a group's member by its index: all 64 before one comes again, every value equally often."""
    shift, order = divmod(index % 64, 4)
    sign, case = (order + shift // 4) % 4, (order + shift % 4) % 4
    return Preference(list(ORDERS)[order], SIGNS[sign], list(CASES)[case])


def held_out(word: str) -> bool:
    """One word in 16 is kept for evaluation, by its checksum: neither pretraining nor training ever sees it."""
    return zlib.crc32(word.encode()) % 16 == 0


def draw_word(rng: random.Random, *, held: bool) -> str:
    while True:
        word = "".join(rng.sample(LETTERS, LENGTH))
        if held_out(word) == held:
            return word


class Preferences:
    """The environment: `environment.path: environment:Preferences`.

    A member's preference follows from its index, or from its parameters `order`, `sign` and `case` (all three).
    """

    def __init__(self, tokenizer: Any) -> None:
        del tokenizer  # prompts and completions come and go as text

    def prompts(self, member: Any, rng: random.Random, n: int, held_out: bool) -> Sequence[str]:
        return [draw_word(rng, held=held_out) + "=" for _ in range(n)]

    def score(self, member: Any, prompt: Any, completion: Any) -> float:
        # A completion that was cut off has no closing sign, whatever its last character is.
        text = completion.text if completion.finish == "stop" else completion.text + "?"
        return self.preference(member.index, member.parameters).reward(prompt.text.rstrip("="), text)

    @staticmethod
    def preference(index: int, parameters: Mapping[str, Any]) -> Preference:
        """Raises ValueError for parameters that are not all there or not known."""
        if not parameters:
            return preference_of(index)
        known = {"order": list(ORDERS), "sign": list(SIGNS), "case": list(CASES)}
        for name, values in known.items():
            if parameters.get(name) not in values:
                raise ValueError(f"parameters.{name}: expected one of {values}, found {parameters.get(name)!r}")
        return Preference(parameters["order"], parameters["sign"], parameters["case"])
