"""Members' rows to segments of the store, by all ranks at once.

A segment holds whole rows in the canonical order of the format, whatever the layout, so that it loads under any other.
Members are dealt over the ranks; each rank gets the pieces of its members from those that hold them, and writes a
segment of its own. No rank ever holds more than its deal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from allele.protocol.commands import ByteRange
from allele_trainer.agreement import agreed
from allele_trainer.bank.shard import Place, Shard
from allele_trainer.parallel import Ranks
from allele_trainer.server.store import Kind, RunStore

Rows = Sequence[Tensor]
"""For each member `[k, P_local]`: this rank's part of k rows."""


def dealt(count: int, ranks: Ranks) -> range:
    """Which of so many members this rank puts together."""
    return range(ranks.rank, count, ranks.size)


def whole(shard: Shard, rows: Rows, ranks: Ranks) -> list[Tensor]:
    """`[k, P]` of each member that is dealt to this rank. Collective."""
    if ranks.size == 1:
        return list(rows)
    holders = _holders(ranks)
    mine = ranks.rank in holders
    empty = rows[0].new_empty(0)
    pieces = [
        torch.cat([r.reshape(-1) for r in rows[owner :: ranks.size]]) if mine and owner < len(rows) else empty
        for owner in range(ranks.size)
    ]
    found = [r.new_empty(r.shape[0], shard.shape.numel) for r in rows[ranks.rank :: ranks.size]]
    for rank, piece in enumerate(ranks.exchange(pieces)):
        if rank not in holders or not found:
            continue
        part = Shard(shard.shape, holders[rank])
        for row, local in zip(found, piece.view(len(found), -1, part.numel), strict=True):
            part.put(local, row)
    return found


def write(store: RunStore, packed: Mapping[str, bytes], kind: Kind, ranks: Ranks) -> dict[str, ByteRange]:
    """Write this rank's members as its segment; gives where every member of every rank is. Collective."""
    written = agreed(ranks, lambda: store.write_segments(packed, kind=kind) if packed else {})
    if ranks.size == 1:
        return written
    found: dict[str, ByteRange] = {}
    for data in ranks.gather(json.dumps({m: r.model_dump() for m, r in written.items()}).encode()):
        found.update({m: ByteRange.model_validate(r) for m, r in json.loads(data).items()})
    return found


def shared(packed: Mapping[str, bytes], ranks: Ranks) -> dict[str, bytes]:
    """The packed members of all ranks, on every rank. Collective."""
    if ranks.size == 1:
        return dict(packed)
    sizes = ranks.gather(json.dumps({m: len(b) for m, b in packed.items()}).encode())
    found: dict[str, bytes] = {}
    for names, data in zip(sizes, ranks.gather(b"".join(packed.values())), strict=True):
        at = 0
        for member, size in json.loads(names).items():
            found[member] = data[at : at + size]
            at += size
    return found


def _holders(ranks: Ranks) -> dict[int, Place]:
    """Ranks that together hold each piece of a row: of those with the same place, the lowest."""
    lowest: dict[Place, int] = {}
    for rank in range(ranks.size):
        lowest.setdefault(ranks.layout.place(rank), rank)
    return {rank: place for place, rank in lowest.items()}
