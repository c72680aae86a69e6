"""Which part of an adapter's row a rank holds, and how rows move between a rank and the whole.

A local row is the row of a smaller model: the same tensors in the same order, those of this rank's layers and experts
only, each with this rank's share of its linear. Megatron splits q, k, v, gate and up by outputs (so B by rows, A is
whole) and o and down by inputs (so A by columns, B is whole); an expert is whole on its rank. A norm or an export that
took a whole matrix once per tensor rank would be wrong in silence: `replicated` and `counted` say which these are.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable

from torch import Tensor

from allele.format import AdapterShape
from allele.format.shape import TensorSlot

_NAME = re.compile(
    r"layers\.(?P<layer>\d+)\.(?P<parent>\w+)\.(experts\.(?P<expert>\d+)\.)?(?P<target>\w+_proj)\."
    r"lora_(?P<kind>[AB])\.weight$"
)
_BY_INPUTS = ("o_proj", "down_proj")
"""Targets whose linear Megatron splits by inputs; all others by outputs."""


class LayoutError(Exception):
    """A tensor table is not what the model's linears need, or does not divide over the ranks."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Where in the model a tensor of an adapter belongs; `expert` is None outside of expert layers."""

    layer: int
    expert: int | None
    target: str
    kind: str
    """A or B."""


def site(name: str) -> Site:
    """Raises LayoutError for a name that is not an adapter's."""
    match = _NAME.search(name)
    if match is None:
        raise LayoutError(
            f"{name}: expected layers.<i>.<module>[.experts.<e>].<target>_proj.lora_A|B.weight at its end"
        )
    expert = match["expert"]
    return Site(int(match["layer"]), None if expert is None else int(expert), match["target"], match["kind"])


@dataclasses.dataclass(frozen=True)
class Place:
    """Coordinates of a rank; the default is the only rank there is."""

    tp: int = 1
    tp_rank: int = 0
    pp: int = 1
    pp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0


@dataclasses.dataclass(frozen=True)
class _Piece:
    """`lines` × `length` elements: contiguous in the local row, `stride` apart in the whole row."""

    local: int
    whole: int
    lines: int
    length: int
    stride: int

    @property
    def numel(self) -> int:
        return self.lines * self.length


class Shard:
    """The part of rows of `shape` that the rank at `place` holds; offsets in elements."""

    def __init__(self, shape: AdapterShape, place: Place | None = None) -> None:
        """Raises LayoutError when layers, experts or a linear's share do not divide over the ranks."""
        self.shape, self.place = shape, place or Place()
        self.tensors: tuple[TensorSlot, ...] = ()
        sites = [site(t.name) for t in shape.tensors]
        layers = _share(_count(s.layer for s in sites), self.place.pp, self.place.pp_rank, "layers", "pp")
        experts = _share(
            _count(s.expert for s in sites if s.expert is not None), self.place.ep, self.place.ep_rank, "experts", "ep"
        )
        tensors, pieces, self._marks = [], [], []
        at = 0
        for tensor, where in zip(shape.tensors, sites, strict=True):
            if where.layer in layers and (where.expert is None or where.expert in experts):
                local, piece = _slice(tensor, where, self.place, at)
                tensors.append(local)
                pieces.append(piece)
                mark = "expert" if where.expert is not None else "whole" if local.shape == tensor.shape else "sliced"
                self._marks.append((mark, slice(at, at + local.numel)))
                at += local.numel
        self.tensors, self.numel = tuple(tensors), at
        self._pieces = _merged(pieces)

    @property
    def whole(self) -> bool:
        """Whether this rank holds all of a row."""
        return self.numel == self.shape.numel

    @functools.cached_property
    def replicated(self) -> tuple[slice, ...]:
        """Slices of the local row that the other tensor ranks of this stage hold too; none when there are no others."""
        return self._marked("whole") if self.place.tp > 1 else ()

    @functools.cached_property
    def experts(self) -> tuple[slice, ...]:
        """Slices of the local row that belong to experts, which only the ranks with this `ep_rank` hold."""
        return self._marked("expert")

    @functools.cached_property
    def dense(self) -> tuple[slice, ...]:
        """All that are not experts'."""
        return self._marked("whole", "sliced")

    @functools.cached_property
    def counted(self) -> tuple[slice, ...]:
        """Slices, without experts', whose squares this rank adds to a norm: each element on one tensor rank alone."""
        return self._marked("sliced") if self.place.tp_rank else self.dense

    def take(self, whole: Tensor) -> Tensor:
        """`[..., P]` → `[..., numel]`: this rank's part; the same storage when the rank holds everything."""
        if self.whole:
            return whole
        local = whole.new_empty(*whole.shape[:-1], self.numel)
        for p in self._pieces:
            _local(local, p).copy_(_whole(whole, p))
        return local

    def put(self, local: Tensor, whole: Tensor) -> None:
        """Write this rank's part `[..., numel]` into whole rows `[..., P]`; the rest of them stays."""
        for p in self._pieces:
            _whole(whole, p).copy_(_local(local, p))

    def _marked(self, *marks: str) -> tuple[slice, ...]:
        found: list[slice] = []
        for mark, piece in self._marks:
            if mark in marks:
                joined = bool(found) and found[-1].stop == piece.start
                found[-1:] = [slice(found[-1].start, piece.stop)] if joined else [*found[-1:], piece]
        return tuple(found)


def _local(rows: Tensor, piece: _Piece) -> Tensor:
    return rows[..., piece.local : piece.local + piece.numel].unflatten(-1, (piece.lines, piece.length))


def _whole(rows: Tensor, piece: _Piece) -> Tensor:
    """`[..., lines, length]`, a view."""
    size = (*rows.shape[:-1], piece.lines, piece.length)
    strides = (*rows.stride()[:-1], piece.stride * rows.stride(-1), rows.stride(-1))
    return rows.as_strided(size, strides, rows.storage_offset() + piece.whole * rows.stride(-1))


def _count(indices: Iterable[int]) -> int:
    return max(indices, default=-1) + 1


def _share(count: int, size: int, rank: int, what: str, axis: str) -> range:
    if count % size:
        raise LayoutError(f"{what}: expected a multiple of {axis} = {size}, found {count}")
    each = count // size
    return range(rank * each, (rank + 1) * each)


def _slice(tensor: TensorSlot, where: Site, place: Place, at: int) -> tuple[TensorSlot, _Piece]:
    """This rank's part of one tensor, at `at` in the local row."""
    rows, columns = tensor.shape
    split = None if where.expert is not None else 1 if where.target in _BY_INPUTS else 0
    mine = tensor.shape
    first = 0
    if split == 0 and where.kind == "B":
        share = _share(rows, place.tp, place.tp_rank, f"{tensor.name} outputs", "tp")
        mine, first = (len(share), columns), share.start * columns
    elif split == 1 and where.kind == "A":
        share = _share(columns, place.tp, place.tp_rank, f"{tensor.name} inputs", "tp")
        mine, first = (rows, len(share)), share.start
    numel = mine[0] * mine[1]
    piece = (
        _Piece(at, tensor.offset + first, 1, numel, numel)
        if mine[1] == columns
        else _Piece(at, tensor.offset + first, mine[0], mine[1], columns)
    )
    return TensorSlot(tensor.name, mine, at, numel), piece


def _merged(pieces: list[_Piece]) -> list[_Piece]:
    """Join pieces that follow each other in both rows: a whole row is one copy, however many tensors it has."""
    found: list[_Piece] = []
    for p in pieces:
        last = found[-1] if found else None
        if last and last.lines == p.lines == 1 and last.whole + last.length == p.whole:
            length = last.length + p.length
            found[-1] = _Piece(last.local, last.whole, 1, length, length)
        else:
            found.append(p)
    return found
