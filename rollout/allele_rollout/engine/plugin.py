"""What our SGLang plugins share: applied once in a process, and loudly.

SGLang loads them in each of its processes through the entry-point group `sglang.srt.plugins`, logs a failing one and
goes on without it. Here a failure ends the process instead, so a server that runs has its plugins.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

GROUP = "sglang.srt.plugins"
FAILED = 78
"""Exit code (EX_CONFIG) of a server whose SGLang a plugin does not fit."""

_applied: set[str] = set()


def applied_once(name: str, apply: Callable[[], None]) -> None:
    """Run `apply` unless it ran before in this process: an entry point may be discovered twice."""
    if name in _applied:
        return
    try:
        apply()
    except Exception:
        logging.getLogger(__name__).exception("Plugin %s does not fit this SGLang: expected the pinned version", name)
        logging.shutdown()
        os._exit(FAILED)
    _applied.add(name)
