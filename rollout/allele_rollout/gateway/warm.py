"""Disk tier: one PEFT folder per adapter, bounded in bytes, safe to kill at any time.

A folder appears by renaming a finished temporary one, so it is whole or absent. Bytes are checked against the
recorded digest each time they are about to be loaded, not only when fetched: disks lie too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from allele.protocol.errors import DigestMismatch, Overloaded
from allele.residency import Tier, TierFull

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class Packed:
    """An adapter apart from its numbers: enough to know whether bytes are right."""

    digest: str
    """sha256 (hex) of the packed bytes."""
    length: int
    """Bytes."""
    config: bytes
    """PEFT's adapter_config.json."""

    @property
    def folder(self) -> str:
        """The same bytes under another alpha are another adapter."""
        return f"{self.digest}-{hashlib.sha256(self.config).hexdigest()[:12]}"


class FolderCache:
    """PEFT folders, least recently used dropped first."""

    def __init__(self, root: Path, *, capacity: int) -> None:
        self._root = root
        self._slots: Tier[str] = Tier(capacity=capacity)
        self._flights: dict[str, asyncio.Task[Path]] = {}
        root.mkdir(parents=True, exist_ok=True)
        found = []
        for path in root.iterdir():
            if path.name.startswith(".tmp"):
                shutil.rmtree(path, ignore_errors=True)
            elif (weights := path / WEIGHTS).exists():
                found.append((weights.stat().st_mtime, path.name, weights.stat().st_size))
        for _, name, size in sorted(found):
            self._admit(name, size=size)

    @property
    def capacity(self) -> int:
        return self._slots.capacity or 0

    @property
    def size(self) -> int:
        """Bytes kept."""
        return self._slots.bytes

    def __len__(self) -> int:
        return len(self._slots)

    @asynccontextmanager
    async def folder(self, packed: Packed, read: Callable[[], Awaitable[bytes]]) -> AsyncIterator[Path]:
        """The folder of this adapter, kept while in use; `read` gets its bytes from the store when they are not here.

        One read per adapter, however many ask at once. Raises DigestMismatch, Overloaded (all that is here is in use),
        and whatever `read` raises.
        """
        name = packed.folder
        self._admit(name, size=packed.length, pin=True)
        try:
            flight = self._flights.get(name)
            if flight is None:
                flight = self._flights[name] = asyncio.ensure_future(self._materialise(packed, read))
                flight.add_done_callback(lambda _: self._flights.pop(name, None))
            yield await asyncio.shield(flight)
        finally:
            self._slots.unpin(name)
            if not self._slots.pins(name) and not (self._root / name).exists():
                self._slots.remove(name)

    async def _materialise(self, packed: Packed, read: Callable[[], Awaitable[bytes]]) -> Path:
        path = self._root / packed.folder
        if not await asyncio.to_thread(_intact, path, packed.digest):
            data = await read()
            await asyncio.to_thread(_write, path, data, packed)
        return path

    def _admit(self, name: str, *, size: int, pin: bool = False) -> None:
        try:
            evicted = self._slots.admit(name, size=size, pin=pin)
        except TierFull as e:
            raise Overloaded(f"disk tier: {e}", retry_after=1.0) from e
        for old in evicted:
            shutil.rmtree(self._root / old, ignore_errors=True)


def _intact(path: Path, digest: str) -> bool:
    """Whether the folder is there with the right bytes; one with wrong bytes is removed."""
    if not path.exists():
        return False
    if _digest((path / WEIGHTS).read_bytes()) == digest:
        return True
    shutil.rmtree(path)
    return False


def _write(path: Path, data: bytes, packed: Packed) -> None:
    if (found := _digest(data)) != packed.digest:
        raise DigestMismatch(f"adapter bytes: expected sha256 {packed.digest}, found {found}; not loaded")
    draft = path.with_name(f".tmp-{uuid.uuid4().hex}")
    draft.mkdir()
    for name, content in ((WEIGHTS, data), (CONFIG, packed.config)):
        with open(draft / name, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
    draft.rename(path)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
