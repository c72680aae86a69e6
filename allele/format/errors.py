"""The one error of this package: bytes or a folder that are not of the shape they were read as."""

from __future__ import annotations


class ShapeMismatch(ValueError):
    """Names the tensor (or the part of the file), what was expected and what was found; nothing was loaded."""

    def __init__(self, what: str, *, expected: object, found: object, hint: str = "") -> None:
        super().__init__(f"{what}: expected {expected}, found {found}" + (f"; {hint}" if hint else ""))
        self.what = what
        self.expected = expected
        self.found = found
