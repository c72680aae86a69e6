"""Host tier of packed adapters: one bounded file in shared memory, which the engine maps as well.

Written with `pwrite`, never through a mapping: a file system that is full then answers with an error, not a signal.
Pages come to be when they are first written, so a large capacity costs nothing until it is used.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from allele.residency.space import Space

_SUFFIX = ".arena"


class Arena:
    """A file that belongs to the gateway of one engine."""

    def __init__(self, folder: Path, *, owner: str, capacity: int) -> None:
        """`owner`: what an earlier gateway of the same engine had in the names of its files, which are removed.

        Raises OSError when the folder cannot hold `capacity` bytes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{owner}-*{_SUFFIX}"):
            old.unlink(missing_ok=True)
        free = free_bytes(folder)
        if capacity > free:
            raise OSError(f"{folder}: expected room for {capacity} bytes, found {free}")
        self.path = folder / f"{owner}-{uuid.uuid4().hex}{_SUFFIX}"
        self.space = Space(capacity)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._fd, self.space.capacity)

    def write(self, offset: int, data: bytes) -> None:
        """Raises OSError."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def close(self) -> None:
        os.close(self._fd)
        self.path.unlink(missing_ok=True)


def usual_capacity(folder: Path) -> int:
    """Half of what the folder has free or this container may use, at most 16 GiB.

    The pages count against the memory limit of whoever writes them first.
    """
    return min(free_bytes(folder), *_limit(), 32 << 30) // 2


def free_bytes(folder: Path) -> int:
    """What a file in this folder may take."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _limit() -> list[int]:
    """The container's memory limit, if it has one."""
    try:
        return [int(Path("/sys/fs/cgroup/memory.max").read_text())]
    except (OSError, ValueError):  # another cgroup version, or `max`
        return []
