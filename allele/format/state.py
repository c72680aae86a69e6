"""Training state of one adapter for exact resume: weights, both Adam moments and the step, as one safetensors file.

Always fp32, flat, in the order of the adapter's shape; the shape's digest is in the header, so that the state of
another shape of equal size is refused.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allele.format import header
from allele.format.errors import ShapeMismatch
from allele.format.shape import AdapterShape

_ROWS = ("weights", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Views over the bytes they were read from; each array is float32 `[P]`."""

    weights: NDArray[np.float32]
    exp_avg: NDArray[np.float32]
    exp_avg_sq: NDArray[np.float32]
    step: int
    """Optimizer steps applied so far."""


@dataclasses.dataclass(frozen=True)
class StateShape:
    """Layout of the state file of a shape; the adapter's own dtype does not matter."""

    shape: AdapterShape

    @functools.cached_property
    def entries(self) -> tuple[header.Entry, ...]:
        p = self.shape.numel
        rows = [header.Entry(name, "F32", (p,), 4 * p * i, 4 * p * (i + 1)) for i, name in enumerate(_ROWS)]
        return (*rows, header.Entry("step", "I64", (1,), 12 * p, 12 * p + 8))

    @functools.cached_property
    def header(self) -> bytes:
        return header.build(self.entries, {"shape": self.shape.digest})

    @property
    def nbytes(self) -> int:
        """Bytes of data, without the header."""
        return 12 * self.shape.numel + 8

    def pack(self, *, weights: Any, exp_avg: Any, exp_avg_sq: Any, step: int) -> bytes:
        """A state file of three rows (contiguous float32 buffers of P elements). One copy."""
        rows = [header.flat(r, name) for name, r in zip(_ROWS, (weights, exp_avg, exp_avg_sq), strict=True)]
        for name, row in zip(_ROWS, rows, strict=True):
            if row.nbytes != 4 * self.shape.numel:
                raise ShapeMismatch(name, expected=f"F32 [{self.shape.numel}]", found=f"{row.nbytes} bytes")
        return b"".join((self.header, *rows, int(step).to_bytes(8, "little", signed=True)))

    def unpack(self, packed: Any) -> State:
        """Raises ShapeMismatch for the state of another shape, naming what differs."""
        what = f"state of shape {self.shape.digest[:12]}"
        data = header.check(header.flat(packed, what), self.header, self.entries, what)
        p = self.shape.numel
        weights, exp_avg, exp_avg_sq = np.frombuffer(data[: 12 * p], dtype="<f4").reshape(len(_ROWS), p)
        step = int.from_bytes(data[12 * p :], "little", signed=True)
        return State(weights=weights, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step)
