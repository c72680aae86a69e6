"""Numbers of a file into those of a shape: float32 in between, which holds every BF16 and F16 exactly.

numpy has no bfloat16, so that BF16 is handled as its bits in uint16.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FLOATS: Final = ("F32", "BF16", "F16")
"""Dtypes that an adapter may come in."""


def widen(raw: memoryview, dtype: str) -> NDArray[np.float32]:
    """Values of one of FLOATS as float32, flat; BF16 and F32 keep their bits, NaN's too."""
    if dtype == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, dtype="<f2" if dtype == "F16" else "<f4").astype("<f4", copy=False)


def loses_bits(values: NDArray[np.float32], dtype: str) -> bool:
    """Whether `dtype`, F32 or BF16, cannot hold these values exactly."""
    return dtype == "BF16" and bool((values.view("<u4") & 0xFFFF).any())


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """In `dtype`, F32 or BF16, rounded to nearest, ties to even; NaN stays NaN."""
    if dtype == "F32":
        return values
    bits = values.view("<u4")
    high = bits >> 16
    rounded = (bits + (0x7FFF + (high & 1))) >> 16
    lost = np.isnan(values) & ((bits & 0xFFFF) != 0)
    return np.where(np.isnan(values), high | (lost * np.uint32(0x40)), rounded).astype("<u2")


def multiplied(values: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """`values` times `factor`, rounded once. Raises OverflowError when a finite value becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = (values.astype("<f8") * factor).astype("<f4")
    if not np.array_equal(np.isfinite(product), np.isfinite(values)):
        raise OverflowError(f"float32 cannot hold the values times {factor:g}")
    return product
