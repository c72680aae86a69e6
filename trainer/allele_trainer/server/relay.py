"""What rank 0 was sent, on every rank: the same commands in the same order make the same rows.

Only rank 0 has HTTP. Before each turn of its loop it tells the others which commands came; what else decides a turn
follows from them, except measured times, which are told as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

from allele.protocol.commands import Mode
from allele_trainer.parallel import Ranks

Command = tuple[str, bytes]
"""Name and body."""

_END = b"end"


class Relay:
    """Every method is collective: rank 0 gives what the others get."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    @property
    def leads(self) -> bool:
        return self._ranks.rank == 0

    @property
    def alone(self) -> bool:
        return self._ranks.size == 1

    def commands(self, found: Sequence[Command] | None) -> list[Command] | None:
        """The commands of a turn; None, from rank 0 and then everywhere, ends the loop."""
        if self.alone:
            return None if found is None else list(found)
        data = self._ranks.broadcast((_END if found is None else _encode(found)) if self.leads else None)
        return None if data == _END else _decode(data)

    def choice(self, mode: Mode, *, curious: bool) -> tuple[Mode, bool]:
        """Rank 0's choice, which comes from its clock."""
        if self.alone:
            return mode, curious
        data = self._ranks.broadcast(json.dumps([mode, curious]).encode() if self.leads else None)
        told = json.loads(data)
        return cast(Mode, told[0]), bool(told[1])


def _encode(commands: Sequence[Command]) -> bytes:
    sizes = json.dumps([(name, len(body)) for name, body in commands]).encode()
    return b"\n".join((sizes, b"".join(body for _, body in commands)))


def _decode(data: bytes) -> list[Command]:
    sizes, _, bodies = data.partition(b"\n")
    found: list[Command] = []
    at = 0
    for name, size in json.loads(sizes):
        found.append((name, bodies[at : at + size]))
        at += size
    return found
