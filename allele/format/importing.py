"""A folder with somebody's LoRA adapter → the row of a shape.

The folder is not trusted: pickles are not opened, links not followed, sizes bounded before they are believed. Its
tensors may be named, ordered, fused and typed as they like (`layouts`), but nothing of it is dropped: what a row cannot
hold is refused.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allele.format import cast as casting
from allele.format import header
from allele.format.errors import ShapeMismatch
from allele.format.header import Entry, describe
from allele.format.layouts import match, module_of
from allele.format.lora_config import CONFIG, LoraConfig
from allele.format.peft import WEIGHTS
from allele.format.shape import AdapterShape

_PICKLE = "adapter_model.bin"
_CONFIG_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Imported:
    row: memoryview
    """`shape.nbytes` bytes in the shape's dtype."""
    scale: float
    """Factor on B·A·x that goes with the row."""
    weights: Path
    """The file that it was read from."""


def import_peft(
    directory: str | Path, shape: AdapterShape, *, scale: float | None = None, fold: bool = False, cast: bool = False
) -> Imported:
    """The row of a LoRA folder: of PEFT, of a trainer's checkpoint, with the names of an engine, fused or split.

    The files are in `directory` or in the one subfolder of it that has them. A row has the bits of the file where
    dtypes are the same or the shape's is wider. Bits, but not the product B·A, change where:
    - a rank is smaller than the shape's: A and B are padded with zeros, which take no gradient when trained;
    - modules have different scales (`alpha_pattern`, `rank_pattern`): the ratio goes into B, in fp32, rounded once;
    - `scale` is given, is not the folder's own (lora_alpha / r, or / √r with use_rslora), and `fold` allows to put the
      ratio into B likewise.
    `cast` allows to round values that the shape's dtype cannot hold.

    Raises ShapeMismatch naming tensor or key, expected and found, and what to do. That the adapter was trained over
    another base of the same sizes cannot be seen here.
    """
    folder = _find(Path(directory))
    config = LoraConfig.parse(bytes(_mapped(folder / CONFIG, most=_CONFIG_BYTES)))
    data = _mapped(folder / WEIGHTS)
    ours = config.uniform and config.rank == shape.rank and header.starts_with(data, shape.header)
    if ours:
        body = header.check(data, shape.header, shape.entries, WEIGHTS)
        sources = {e.name: e for e in shape.entries}
    else:
        found, start = header.parse(data, WEIGHTS, tensors=len(shape.tensors))
        sources, body = match(shape, found, config, WEIGHTS), data[start:]
    own = _own_scale(config, sources)
    target = _target_scale(own, scale, fold=fold)
    if ours and own == target:
        row = memoryview(bytearray(body))
    else:
        row = _fill(shape, body, sources, _ratios(config, sources, target), cast=cast)
    return Imported(row=row.toreadonly(), scale=target, weights=folder / WEIGHTS)


def _find(directory: Path) -> Path:
    """The folder with the weights: `directory`, or the only one below it that has them (checkpoint-N)."""
    if not directory.is_dir():
        raise ShapeMismatch(str(directory), expected="a folder with an adapter", found="none")
    if os.path.lexists(directory / WEIGHTS):
        return directory
    below = sorted(p.parent for p in directory.glob(f"*/{WEIGHTS}"))
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(p.name for p in below)
        raise ShapeMismatch(str(directory), expected=WEIGHTS, found=f"one in each of {names}", hint="name one of them")
    pickle = next((p for pattern in (_PICKLE, f"*/{_PICKLE}") for p in directory.glob(pattern)), None)
    if pickle is None:
        raise ShapeMismatch(str(directory), expected=f"{WEIGHTS} in it or in a folder below", found="none")
    raise ShapeMismatch(
        str(directory),
        expected=WEIGHTS,
        found=f"{pickle.relative_to(directory)}, a pickle, which can run any code when it is read",
        hint="load it with PEFT where that does no harm, and save it again with safe_serialization=True",
    )


def _mapped(path: Path, *, most: int | None = None) -> memoryview:
    """The bytes of a regular file, not read yet. It is unmapped with the last view of it."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        found = {errno.ELOOP: "a symbolic link", errno.ENOENT: "no such file"}.get(e.errno or 0)
        if found is None:
            raise
        hint = "copy the folder with links followed: cp -rL" if e.errno == errno.ELOOP else "add it to the folder"
        raise ShapeMismatch(str(path), expected="a file", found=found, hint=hint) from e
    try:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise ShapeMismatch(str(path), expected="a file", found=stat.filemode(status.st_mode)[0] + " (no file)")
        if not status.st_size or (most is not None and status.st_size > most):
            wanted = "a file that is not empty" if most is None else f"1 to {most} bytes"
            raise ShapeMismatch(str(path), expected=wanted, found=f"{status.st_size} bytes")
        return memoryview(mmap.mmap(opened, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(opened)


def _own_scale(config: LoraConfig, sources: Mapping[str, Entry]) -> float:
    """That of all modules, or of those without a pattern, or of the first module."""
    usual = config.scale_of("")
    if config.uniform:
        return usual
    scales = dict.fromkeys(config.scale_of(module_of(f.name)) for f in sources.values())
    return usual if usual in scales else next(iter(scales))


def _target_scale(own: float, wanted: float | None, *, fold: bool) -> float:
    if wanted is None or math.isclose(own, wanted, rel_tol=1e-9):
        return own
    if not fold:
        raise ShapeMismatch(
            f"{CONFIG} scale",
            expected=f"{wanted:g}",
            found=f"{own:g}",
            hint="fold the ratio into B (fold, --fold-scale), which changes bits but not the product",
        )
    return wanted


def _ratios(config: LoraConfig, sources: Mapping[str, Entry], target: float) -> Mapping[str, float]:
    """Names of B in the file → what to multiply it by."""
    if config.uniform:
        ratio = config.scale_of("") / target
        return dict.fromkeys((f.name for name, f in sources.items() if ".lora_B." in name), ratio)
    return {f.name: config.scale_of(module_of(f.name)) / target for name, f in sources.items() if ".lora_B." in name}


def _fill(
    shape: AdapterShape, body: memoryview, sources: Mapping[str, Entry], ratios: Mapping[str, float], *, cast: bool
) -> memoryview:
    row = memoryview(bytearray(shape.nbytes))
    for e in shape.entries:
        f = sources[e.name]
        raw, ratio = body[f.start : f.end], ratios.get(f.name, 1.0)
        if ratio != 1.0 or (f.dtype, f.shape) != (e.dtype, e.shape):
            raw = header.flat(_converted(raw, f, e, ratio=ratio, cast=cast), f.name)
        row[e.start : e.end] = raw
    return row


def _converted(raw: memoryview, f: Entry, e: Entry, *, ratio: float, cast: bool) -> NDArray[Any]:
    """Numbers of `f` as those of `e`: multiplied, padded with zeros, cast."""
    values = casting.widen(raw, f.dtype).reshape(f.shape)
    if ratio != 1.0:
        try:
            values = casting.multiplied(values, ratio)
        except OverflowError as error:
            raise ShapeMismatch(f.name, expected=f"finite values times {ratio:g}", found=str(error)) from error
    if f.shape != e.shape:
        padded = np.zeros(e.shape, dtype="<f4")
        padded[: f.shape[0], : f.shape[1]] = values
        values = padded
    if not cast and casting.loses_bits(values, e.dtype):
        raise ShapeMismatch(
            f.name,
            expected=f"{describe(e)}, or values that {e.dtype} holds exactly",
            found=describe(f),
            hint="allow to round them (cast, --cast)",
        )
    return casting.narrow(values, e.dtype)
