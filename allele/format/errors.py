"""The one error of this package: bytes or a folder that are not of the shape they were read as."""

from __future__ import annotations

_LONGEST = 300
"""Characters of a part of a message: names and values come out of other people's files."""


class ShapeMismatch(ValueError):
    """Names the tensor (or the part of the file), what was expected and what was found; nothing was loaded.

    The message is one printable line, whatever the file had in its names.
    """

    def __init__(self, what: str, *, expected: object, found: object, hint: str = "") -> None:
        text = f"{_shown(what)}: expected {_shown(expected)}, found {_shown(found)}"
        super().__init__(text + (f"; {hint}" if hint else ""))
        self.what = what
        self.expected = expected
        self.found = found


def _shown(value: object) -> str:
    text = str(value)
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    return text if text.isprintable() else repr(text)[1:-1]
