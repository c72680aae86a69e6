"""The banks of a micro-batch, one for each shape of its adapters, with their slots counted on from bank to bank.

Such a number is an owner of tokens: packing, losses and sums know owners alone, and so a micro-batch is one pass of the
model however many shapes meet in it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

from allele_trainer.bank.rows import Bank


class Banks:
    """In an order that is the same on every rank."""

    def __init__(self, banks: Iterable[Bank]) -> None:
        self.all = tuple(banks)
        self._firsts = [0, *itertools.accumulate(bank.slots + bank.probes for bank in self.all)]

    def owner(self, bank: int, slot: int) -> int:
        """Of a slot of the bank at that place."""
        return self._firsts[bank] + slot

    def slot(self, owner: int) -> tuple[Bank, int]:
        place = bisect.bisect_right(self._firsts, owner) - 1
        return self.all[place], owner - self._firsts[place]

    def split(self, counts: Sequence[tuple[int, int]]) -> list[tuple[Bank, list[tuple[int, int]]]]:
        """(owner, tokens) in ascending order of owner → (slot, tokens) of each bank that has some."""
        found: list[tuple[Bank, list[tuple[int, int]]]] = []
        for owner, tokens in counts:
            bank, slot = self.slot(owner)
            if not found or found[-1][0] is not bank:
                found.append((bank, []))
            found[-1][1].append((slot, tokens))
        return found
