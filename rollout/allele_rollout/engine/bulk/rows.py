"""Packed adapters in a mapped file, as the scheduler sees them: no copy, no tensor objects until one is used.

A file is mapped once. Whoever writes it must not change the bytes of an adapter before the engine has dropped it: they
are read when the adapter enters a slot, which may be at any time.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from allele_rollout.engine.bulk.layout import Layout

_LENGTH = 8
"""Bytes before the header of a safetensors file: its length, little-endian."""


class MappedFile:
    """Bytes of a file, shared with whoever writes it."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(fd)
            self._map = mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        self.identity = (status.st_dev, status.st_ino, status.st_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no read-only tensors; nobody writes to this one
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def header(self, offset: int) -> bytes:
        """JSON header of the safetensors file at `offset`. Raises ValueError when there is none."""
        length = int.from_bytes(self._map[offset : offset + _LENGTH], "little") if offset >= 0 else 0
        end = offset + _LENGTH + length
        if not 0 < length <= len(self._map) or end > len(self._map) or self._map[offset + _LENGTH : offset + 9] != b"{":
            raise ValueError(f"offset {offset}: expected a packed adapter, found none")
        return self._map[offset + _LENGTH : end]

    def row(self, start: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """Elements of the `nbytes` from `start`, not copied."""
        return self._bytes[start : start + nbytes].view(dtype)

    def holds(self, end: int) -> bool:
        return end <= len(self._map)


class RowAdapter:
    """What SGLang reads of a LoRAAdapter, for a packed adapter in a file."""

    __slots__ = ("_file", "_start", "layout")

    def __init__(self, layout: Layout, file: MappedFile, start: int) -> None:
        self.layout, self._file, self._start = layout, file, start

    @property
    def config(self) -> Any:
        return self.layout.config

    @property
    def scaling(self) -> float:
        return self.layout.scaling

    def fill(self, pool: Any, slot: int) -> None:
        self.layout.fill(pool, slot, self._file.row(self._start, self.layout.nbytes, self.layout.dtype))


class Shelf:
    """Files and layouts that a scheduler knows."""

    def __init__(self) -> None:
        self._files: weakref.WeakValueDictionary[str, MappedFile] = weakref.WeakValueDictionary()
        self._layouts: dict[tuple[str, bytes], Layout] = {}

    def adapters(self, manager: Any, path: str, config: str, offsets: Sequence[int]) -> list[RowAdapter]:
        """One for each offset. Raises ValueError or OSError, naming what is wrong."""
        file = self._file(path)
        found = []
        header, layout = b"", None
        for offset in offsets:
            if (here := file.header(offset)) != header or layout is None:
                header, layout = here, self._layout(manager, config, here)
            start = offset + _LENGTH + len(header)
            if not file.holds(start + layout.nbytes):
                raise ValueError(f"{path}: offset {offset}: expected {layout.nbytes} bytes of weights, the file ends")
            found.append(RowAdapter(layout, file, start))
        return found

    def _file(self, path: str) -> MappedFile:
        status = os.stat(path)
        file = self._files.get(path)
        if file is None or file.identity != (status.st_dev, status.st_ino, status.st_size):
            file = self._files[path] = MappedFile(path)
        return file

    def _layout(self, manager: Any, config: str, header: bytes) -> Layout:
        key = (config, header)
        if key not in self._layouts:
            parsed: Mapping[str, Any] = json.loads(config)
            self._layouts[key] = Layout(manager, parsed, header)
        return self._layouts[key]
