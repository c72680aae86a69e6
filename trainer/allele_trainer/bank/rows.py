"""The bank: buffers W, M, V whose row i is the adapter in slot i, and G whose rows are lent to slots with a gradient.

Twelve bytes per parameter of a slot, four per parameter of a gradient row; on CUDA two more for the bfloat16 copy that
the kernels read, made when a row is stored or stepped and never per pass. Rows beyond `slots` exist only in what the
kernels read: exported bytes are read back into them and probed, no training slot is touched. Row starts are aligned to
64 bytes, because GEMM kernels may give other bits for other alignments and a member's result must not depend on its
slot.

Every store gives the slot a version that no other store had or will have: whoever kept a slot beyond its time (a plan
run late, a page table gone wrong) holds an old version and is refused instead of training another member's row.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from allele_trainer.bank.layout import Block, blocks
from allele_trainer.bank.shard import Shard
from allele_trainer.bank.stream import SideStream

_ALIGN = 16
"""fp32 elements in 64 bytes."""


class StaleSlot(Exception):
    """A slot was given to another row since its version was noted."""


class NoGradientRow(Exception):
    """More slots hold a gradient at once than there are gradient rows: the page table let too many in."""


@dataclasses.dataclass
class Row:
    """One adapter, or a rank's part of it, in host memory: `[P]` each."""

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0


@dataclasses.dataclass(frozen=True)
class Stack:
    """Strided views of all rows for one linear: A `[rows, k·r, in]`, each B `[rows, out, r]`, as the kernels read them;
    and their gradients, `[gradient rows, …]`."""

    block: Block
    a: Tensor
    a_grad: Tensor
    b: tuple[Tensor, ...]
    b_grad: tuple[Tensor, ...]


class Bank:
    """Rows of one AdapterShape, or of a rank's part; fixed size, no per-tensor work but the views made here once."""

    def __init__(
        self,
        shard: Shard,
        *,
        slots: int,
        probes: int,
        device: torch.device,
        gradients: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`gradients`: rows of G, as many as slots by default; `dtype`: of what the kernels read."""
        self.shard, self.shape, self.numel = shard, shard.shape, shard.numel
        self.slots, self.probes, self.device = slots, probes, device
        self.gradients = min(slots, gradients or slots)
        stride = _stride(self.numel)

        def buffer(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, stride, device=device, dtype=dtype)

        self._copied = dtype != torch.float32
        self._read = buffer(slots + probes, dtype)
        self._weights = buffer(slots) if self._copied else self._read[:slots]
        self._exp_avg, self._exp_avg_sq = buffer(slots), buffer(slots)
        self._gradient = buffer(self.gradients)
        self._free = list(range(self.gradients))
        self._lent: dict[int, int] = {}
        self._stores = 0
        self.scale = torch.zeros(slots + probes, device=device)
        self.versions = [0] * (slots + probes)
        self.steps = [0] * slots
        self.step_counts = torch.zeros(slots, device=device)
        self.rows = (
            _views(self._weights, self.numel),
            _views(self._exp_avg, self.numel),
            _views(self._exp_avg_sq, self.numel),
        )
        self.step_views = list(self.step_counts.unbind())
        self.gradient_views = _views(self._gradient, self.numel)
        self.stacks = {site: self._stack(block) for site, block in blocks(shard).items()}
        self.stream = SideStream(device)

    def _stack(self, block: Block) -> Stack:
        def views(buffer: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            a_rows = len(block.targets) * block.rank
            a = buffer[:, block.a_offset : block.a_offset + a_rows * block.inputs].unflatten(1, (a_rows, block.inputs))
            b = tuple(
                buffer[:, at : at + out * block.rank].unflatten(1, (out, block.rank))
                for at, out in zip(block.b_offsets, block.outputs, strict=True)
            )
            return a, b

        a, b = views(self._read)
        a_grad, b_grad = views(self._gradient)
        return Stack(block, a, a_grad, b, b_grad)

    @property
    def nbytes(self) -> int:
        """Device memory of the rows."""
        buffers = (self._read, self._weights, self._exp_avg, self._exp_avg_sq, self._gradient)
        storages = {b.untyped_storage().data_ptr(): b.untyped_storage() for b in buffers}
        return sum(storage.nbytes() for storage in storages.values())

    def weights(self, slot: int) -> Tensor:
        """`[P]`, a view."""
        return self.rows[0][slot]

    @property
    def stores(self) -> int:
        """Rows stored so far: while it stays, so do all versions."""
        return self._stores

    def check(self, versions: Iterable[tuple[int, int]], *, noted: int) -> None:
        """Raises StaleSlot unless each (slot, version), noted at that count of `stores`, is what it was then."""
        if noted == self._stores:
            return
        for slot, version in versions:
            if self.versions[slot] != version:
                raise StaleSlot(
                    f"slot {slot}: expected version {version}, found {self.versions[slot]}: another row was stored "
                    "there; nothing of this pass counts"
                )

    # Gradients

    @property
    def gradients_free(self) -> int:
        return len(self._free)

    def has_gradient(self, slot: int) -> bool:
        return slot in self._lent

    def gradient_row(self, slot: int) -> int:
        """The row of G that holds the slot's gradient: a zero one of its own at first.

        Raises NoGradientRow when all are lent.
        """
        row = self._lent.get(slot)
        if row is None:
            if not self._free:
                raise NoGradientRow(f"slot {slot}: expected one of {self.gradients} gradient rows free, found none")
            row = self._lent[slot] = heapq.heappop(self._free)
            self._gradient[row].zero_()
        return row

    def gradient(self, slot: int) -> Tensor:
        """`[P]`, a view."""
        return self.gradient_views[self.gradient_row(slot)]

    def gradients_of(self, rows: Sequence[int]) -> Tensor:
        """`[n, P]` of G: a view where the rows follow each other, else a copy."""
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return self._gradient[rows[0] : rows[0] + len(rows), : self.numel]
        return self._gradient[list(rows), : self.numel]

    def drop_gradient(self, slot: int) -> None:
        row = self._lent.pop(slot, None)
        if row is not None:
            heapq.heappush(self._free, row)

    def spoil(self, slot: int) -> None:
        """Make the gradient not finite, so that the slot's next step is skipped."""
        self.gradient(slot)[0] = torch.nan

    # Rows in and out

    def store(self, slot: int, row: Row, *, scale: float) -> None:
        """Host → slot, on the current stream."""
        self._new_version(slot)
        for views, part in zip(self.rows, (row.weights, row.exp_avg, row.exp_avg_sq), strict=True):
            views[slot].copy_(part, non_blocking=True)
        self.refresh([slot])
        self.drop_gradient(slot)
        self.steps[slot] = row.step
        self.step_counts[slot] = row.step
        self.scale[slot] = scale

    def load(self, slot: int, into: Row | None = None) -> Row:
        """Slot → host: a copy, complete when this returns; with `into`, on the current stream, complete when the stream
        is."""
        if into is None:
            weights, exp_avg, exp_avg_sq = (views[slot].to("cpu", copy=True) for views in self.rows)
            return Row(weights, exp_avg, exp_avg_sq, step=self.steps[slot])
        for views, part in zip(self.rows, (into.weights, into.exp_avg, into.exp_avg_sq), strict=True):
            part.copy_(views[slot], non_blocking=True)
        into.step = self.steps[slot]
        return into

    def release(self, slot: int) -> None:
        """The slot holds nothing any more: its gradient goes with it, and its version."""
        self.drop_gradient(slot)
        self._new_version(slot)

    def refresh(self, slots: Sequence[int]) -> None:
        """Make what the kernels read equal to the weights of these slots; free where they read the weights."""
        if self._copied:
            torch._foreach_copy_([self._read[s, : self.numel] for s in slots], [self.rows[0][s] for s in slots])

    def store_probe(self, index: int, weights: Tensor, *, scale: float) -> int:
        """Put weights `[P]` in a scratch row; gives its slot."""
        slot = self.slots + index
        self._new_version(slot)
        self._read[slot, : self.numel].copy_(weights)
        self.scale[slot] = scale
        return slot

    def _new_version(self, slot: int) -> None:
        self._stores += 1
        self.versions[slot] = self._stores


def bank_bytes(numel: int, *, slots: int, probes: int, gradients: int, dtype: torch.dtype) -> int:
    """What `Bank.nbytes` would be: 12 bytes per element of a slot, 4 of a gradient row, and 2 more of a slot where the
    kernels read bf16."""
    read = (slots + probes) * dtype.itemsize
    master = 0 if dtype == torch.float32 else slots * 4
    return _stride(numel) * (read + master + slots * 8 + gradients * 4)


def _stride(numel: int) -> int:
    return math.ceil(numel / _ALIGN) * _ALIGN


def _views(buffer: Tensor, numel: int) -> list[Tensor]:
    """Rows without their padding, made once: a step asks for hundreds of them."""
    return [row[:numel] for row in buffer.unbind()]
