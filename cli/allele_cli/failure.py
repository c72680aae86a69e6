"""What a command says when it cannot go on."""

from __future__ import annotations


class Failure(Exception):
    """Shown as one line: what, expected, found, what to do."""
