"""The packed bytes of the last exports, for gateways that load them before they could read them from the store.

Bounded in bytes, oldest out first. Written by the thread that executes commands, read by the one that answers HTTP.
Nobody is asked who he is, as with commands: only the cluster's internal network reaches a trainer's port, and who may
send commands can have any row exported anyway.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable


class Recent:
    """By sha256 (hex) of the bytes."""

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes; 0 keeps nothing."""
        self._capacity = capacity
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.used = 0
        """Bytes."""

    def keep(self, digest: str, data: bytes) -> None:
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return
            if len(data) > self._capacity:
                return
            self._kept[digest] = data
            self.used += len(data)
            while self.used > self._capacity:
                _, oldest = self._kept.popitem(last=False)
                self.used -= len(oldest)

    def find(self, digests: Iterable[str], *, most: int) -> dict[str, bytes]:
        """Those that are here, in the order asked for, as long as they are no more than `most` bytes together."""
        found: dict[str, bytes] = {}
        with self._lock:
            for digest in digests:
                data = self._kept.get(digest)
                if data is not None and digest not in found and len(data) <= most:
                    found[digest] = data
                    most -= len(data)
        return found
