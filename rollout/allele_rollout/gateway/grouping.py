"""How rows of a batch become engine calls: pure.

The engine's LoRA kernels merge only consecutive requests of one adapter; interleaved adapters cost four to five times
as much, so rows go out grouped by adapter, and answers come back in the caller's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

K = TypeVar("K")


def groups(adapters: Sequence[K]) -> dict[K, list[int]]:
    """Row numbers by adapter, adapters in order of first appearance, rows in theirs."""
    found: dict[K, list[int]] = {}
    for row, adapter in enumerate(adapters):
        found.setdefault(adapter, []).append(row)
    return found


def calls(by_adapter: dict[K, list[int]], *, slots: int) -> Iterator[dict[K, list[int]]]:
    """Parts of at most `slots` adapters: what one engine batch can hold at once."""
    keys = list(by_adapter)
    for start in range(0, len(keys), slots):
        yield {k: by_adapter[k] for k in keys[start : start + slots]}
