"""Disk tier: packed adapters by digest, bounded in bytes, safe to kill at any time.

A file appears by renaming a finished one and is checked against its name each time it is read, so that nothing has to
be flushed: what a crash or a lying disk leaves is thrown away.
"""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from pathlib import Path

from allele.residency import Tier, TierFull

_DRAFT = ".draft-"


class DiskTier:
    """Files in one folder. Every method blocks; all may be called from several threads."""

    def __init__(self, root: Path, *, capacity: int) -> None:
        """`capacity`: bytes; 0 keeps nothing."""
        self._root = root
        self._tier: Tier[str] = Tier(capacity=capacity)
        self._lock = threading.Lock()
        self.capacity = capacity
        root.mkdir(parents=True, exist_ok=True)
        found = []
        for path in root.iterdir():
            if path.name.startswith(_DRAFT):
                path.unlink(missing_ok=True)
            elif path.is_file():
                status = path.stat()
                found.append((status.st_mtime, path.name, status.st_size))
        for _, name, size in sorted(found):
            if not self._admit(name, size):
                (root / name).unlink(missing_ok=True)

    @property
    def size(self) -> int:
        """Bytes kept."""
        return self._tier.bytes

    def __len__(self) -> int:
        return len(self._tier)

    def __contains__(self, digest: str) -> bool:
        """Without looking at the disk."""
        return digest in self._tier

    def get(self, digest: str) -> bytes | None:
        """The bytes with this sha256 (hex), if they are here."""
        with self._lock:
            if not self._tier.touch(digest):
                return None
        try:
            data = (self._root / digest).read_bytes()
        except OSError:
            data = b""
        if hashlib.sha256(data).hexdigest() == digest:
            return data
        with self._lock:
            self._tier.remove(digest)
            (self._root / digest).unlink(missing_ok=True)
        return None

    def keep(self, digest: str, data: bytes) -> None:
        """Store bytes whose digest is known to be right; a full or failing disk keeps fewer, silently to the caller."""
        with self._lock:
            if digest in self._tier:
                return
        draft = self._root / f"{_DRAFT}{uuid.uuid4().hex}"
        try:
            draft.write_bytes(data)
            with self._lock:
                if self._admit(digest, len(data)):
                    os.replace(draft, self._root / digest)
        finally:
            draft.unlink(missing_ok=True)

    def _admit(self, digest: str, size: int) -> bool:
        try:
            evicted = self._tier.admit(digest, size=size)
        except TierFull:
            return False
        for old in evicted:
            (self._root / old).unlink(missing_ok=True)
        return digest in self._tier
