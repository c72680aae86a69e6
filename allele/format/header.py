"""Safetensors headers, written by hand and compared as bytes.

The safetensors library sorts tensors by its own rule and builds a header per file. Here order and padding belong to
the format (a header is equal for equal shapes, bytes of data start at a multiple of 64), so it is written here and
parsed only to explain a difference or to read a file of someone else. Such a file may be made to harm: its header is
bounded before it is parsed, and every number in it is checked before it is used.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from allele.format.errors import ShapeMismatch

ALIGNMENT = 64
_LENGTH = 8
_HEADER_BYTES = 1 << 20
_TENSOR_BYTES = 512
"""A header may have so many bytes, and so many more for each tensor that the shape has: parsed, JSON takes up to 30
times its bytes, and the 100 MB that the safetensors library accepts would be gigabytes."""

_MAX_DIMENSIONS = 8
_MAX_NUMBER = 1 << 62

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

_PICKLES = ((b"PK\x03\x04", "a zip archive, as torch.save writes it"), (b"\x80", "a pickle"))
"""First bytes of what is at times named .safetensors."""


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


def parse(data: memoryview, what: str, *, tensors: int) -> tuple[dict[str, Entry], int]:
    """Tensors by name, and the offset of the data, which they cover without gap or overlap.

    `tensors`: how many are expected. Raises ShapeMismatch for bytes that are not a whole safetensors file.
    """
    length = int.from_bytes(data[:_LENGTH], "little")
    start = _LENGTH + length
    if data.nbytes < _LENGTH or start > data.nbytes:
        raise ShapeMismatch(what, expected="a safetensors file", found=_without_header(data))
    longest = _HEADER_BYTES + _TENSOR_BYTES * tensors
    if length > longest:
        raise ShapeMismatch(
            f"{what} header", expected=f"at most {longest} bytes for {tensors} tensors", found=f"{length} bytes"
        )
    table = load_json(data[_LENGTH:start], what, expected="a safetensors header")
    if not isinstance(table.pop("__metadata__", {}), dict):
        raise ShapeMismatch(f"{what} __metadata__", expected="an object", found="another value")
    entries = {name: _entry(name, fields) for name, fields in table.items()}
    _check_cover(entries, data.nbytes - start, what)
    return entries, start


def load_json(data: memoryview | bytes, what: str, *, expected: str) -> dict[str, Any]:
    """An object of JSON in UTF-8, no key twice. Raises ShapeMismatch for anything else."""
    try:
        table = json.loads(str(data, "utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise ShapeMismatch(what, expected=expected, found=f"{type(e).__name__}: {e}") from e
    if not isinstance(table, dict):
        raise ShapeMismatch(what, expected=expected, found=f"JSON that is no object but a {type(table).__name__}")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"key {next(n for n, count in counts.items() if count > 1)!r:.100} twice")
    return table


def _entry(name: str, fields: Any) -> Entry:
    try:
        dtype, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (TypeError, KeyError, ValueError) as e:
        raise ShapeMismatch(
            name, expected="dtype, shape and two data_offsets", found=f"{fields!r:.100} ({type(e).__name__})"
        ) from e
    size = ITEM_BYTES.get(dtype) if type(dtype) is str else None
    if size is None:
        raise ShapeMismatch(name, expected="a dtype of safetensors", found=f"{dtype!r:.100}")
    if type(shape) is not list or len(shape) > _MAX_DIMENSIONS or not all(map(_is_size, (*shape, start, end))):
        raise ShapeMismatch(
            name,
            expected=f"a shape of at most {_MAX_DIMENSIONS} sizes and two offsets, whole numbers that are not negative",
            found=f"shape {shape!r:.100}, offsets {start!r:.40} and {end!r:.40}",
        )
    if end - start != math.prod(shape) * size:
        raise ShapeMismatch(
            name, expected=f"{math.prod(shape) * size} bytes for {dtype} {shape}", found=f"offsets {start} to {end}"
        )
    return Entry(name, dtype, tuple(shape), start, end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _check_cover(entries: Mapping[str, Entry], nbytes: int, what: str) -> None:
    """Raise ShapeMismatch unless tensors are one after the other, from the first byte of data to the last."""
    at = 0
    for e in sorted(entries.values(), key=lambda e: (e.start, e.end)):
        if e.start != at:
            raise ShapeMismatch(
                e.name,
                expected=f"offset {at}, where the tensor before it ends",
                found=f"{e.start}: gap or overlap",
            )
        at = e.end
        if at > nbytes:
            raise ShapeMismatch(e.name, expected=f"{at} bytes of data", found=f"{nbytes} (truncated)")
    if at != nbytes:
        raise ShapeMismatch(f"{what} data", expected=f"{at} bytes", found=f"{nbytes} bytes")


def _without_header(data: memoryview) -> str:
    if not data.nbytes:
        return "an empty file"
    first = bytes(data[:_LENGTH])
    kind = next((f", {kind}" for magic, kind in _PICKLES if first.startswith(magic)), "")
    return f"{data.nbytes} bytes with no whole header{kind}"


def compare(expected: Sequence[Entry], found: Mapping[str, Entry], what: str) -> None:
    """Raise ShapeMismatch for the first tensor that is missing, extra, or of another dtype or shape."""
    for e in expected:
        f = found.get(e.name)
        if f is None:
            raise missing(e, what)
        if (f.dtype, f.shape) != (e.dtype, e.shape):
            raise ShapeMismatch(e.name, expected=describe(e), found=describe(f))
    names = {e.name for e in expected}
    for name in found:
        if name not in names:
            hint = f"{what} has {len(found)} tensors, the shape {len(expected)}: other target modules or layers"
            raise ShapeMismatch(name, expected="no such tensor", found=describe(found[name]), hint=hint)


def missing(entry: Entry, what: str) -> ShapeMismatch:
    return ShapeMismatch(entry.name, expected=describe(entry), found=f"no such tensor in {what}")


def describe(entry: Entry) -> str:
    return f"{entry.dtype} [{', '.join(map(str, entry.shape))}]"


def check(packed: memoryview, header: bytes, expected: Sequence[Entry], what: str) -> memoryview:
    """The data of `packed` if its header is `header` byte for byte and the data is whole; else ShapeMismatch.

    `expected` is in order of offsets.
    """
    if not starts_with(packed, header):
        found, _ = parse(packed, what, tensors=len(expected))
        compare(expected, found, what)
        raise ShapeMismatch(
            f"{what} header",
            expected="the tensors in this shape's order, with its metadata",
            found="the same tensors laid out otherwise",
            hint="import it as a PEFT folder instead",
        )
    data = packed[len(header) :]
    size = expected[-1].end
    if data.nbytes != size:
        raise ShapeMismatch(f"{what} data", expected=f"{size} bytes", found=f"{data.nbytes} bytes")
    return data


def starts_with(data: memoryview, header: bytes) -> bool:
    """One comparison of bytes; views compare item by item, 50 times slower than a copy of the header."""
    return bytes(data[: len(header)]) == header


def flat(buffer: Any, what: str) -> memoryview:
    """`buffer` as contiguous bytes without a copy."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ShapeMismatch(what, expected="a contiguous buffer", found=f"strides {view.strides}")
    return view.cast("B") if view.nbytes else memoryview(b"")
