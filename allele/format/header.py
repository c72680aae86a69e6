"""Safetensors headers, written by hand and compared as bytes.

The safetensors library sorts tensors by its own rule and builds a header per file. Here order and padding belong to
the format (a header is equal for equal shapes, bytes of data start at a multiple of 64), so it is written here and
parsed only to explain a difference or to read a file of someone else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from allele.format.errors import ShapeMismatch

ALIGNMENT = 64
_LENGTH = 8
_MAX_HEADER = 100 << 20
"""What the safetensors library accepts; a larger length is not a header."""

ITEM_BYTES = {"F32": 4, "BF16": 2, "I64": 8}


class Entry(NamedTuple):
    """One tensor of a header; `start` and `end` are bytes from the first byte of data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def build(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON, padded with spaces so that the data starts at a multiple of 64."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for e in entries:
        table[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % ALIGNMENT)
    return len(text).to_bytes(_LENGTH, "little") + text


def parse(data: memoryview, what: str) -> tuple[dict[str, Entry], int]:
    """Tensors by name, and the offset of the data. Raises ShapeMismatch for bytes that are not a safetensors file."""
    length = int.from_bytes(data[:_LENGTH], "little")
    if data.nbytes < _LENGTH or length > min(_MAX_HEADER, data.nbytes - _LENGTH):
        raise ShapeMismatch(what, expected="a safetensors file", found=f"{data.nbytes} bytes with no whole header")
    try:
        table = json.loads(bytes(data[_LENGTH : _LENGTH + length]))
        table.pop("__metadata__", None)
        entries = {
            name: Entry(name, str(t["dtype"]), tuple(map(int, t["shape"])), *map(int, t["data_offsets"]))
            for name, t in table.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ShapeMismatch(what, expected="a safetensors header", found=f"{type(e).__name__}: {e}") from e
    return entries, _LENGTH + length


def compare(expected: Sequence[Entry], found: Mapping[str, Entry], what: str) -> None:
    """Raise ShapeMismatch for the first tensor that is missing, extra, or of another dtype or shape."""
    for e in expected:
        f = found.get(e.name)
        if f is None:
            raise ShapeMismatch(e.name, expected=describe(e), found=f"no such tensor in {what}")
        if (f.dtype, f.shape) != (e.dtype, e.shape):
            raise ShapeMismatch(e.name, expected=describe(e), found=describe(f))
        if f.end - f.start != e.end - e.start:
            raise ShapeMismatch(e.name, expected=f"{e.end - e.start} bytes", found=f"{f.end - f.start} bytes")
    names = {e.name for e in expected}
    for name in found:
        if name not in names:
            raise ShapeMismatch(
                name,
                expected="no such tensor",
                found=describe(found[name]),
                hint=f"{what} has {len(found)} tensors, the shape {len(expected)}: other target modules or layers",
            )


def describe(entry: Entry) -> str:
    return f"{entry.dtype} [{', '.join(map(str, entry.shape))}]"


def check(packed: memoryview, header: bytes, expected: Sequence[Entry], what: str) -> memoryview:
    """The data of `packed` if its header is `header` byte for byte and the data is whole; else ShapeMismatch."""
    if packed[: len(header)] != header:
        found, _ = parse(packed, what)
        compare(expected, found, what)
        raise ShapeMismatch(
            f"{what} header",
            expected="the tensors in this shape's order, with its metadata",
            found="the same tensors laid out otherwise",
            hint="import it as a PEFT folder instead",
        )
    data = packed[len(header) :]
    size = max(e.end for e in expected)
    if data.nbytes != size:
        raise ShapeMismatch(f"{what} data", expected=f"{size} bytes", found=f"{data.nbytes} bytes")
    return data


def flat(buffer: Any, what: str) -> memoryview:
    """`buffer` as contiguous bytes without a copy."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ShapeMismatch(what, expected="a contiguous buffer", found=f"strides {view.strides}")
    return view.cast("B") if view.nbytes else memoryview(b"")
