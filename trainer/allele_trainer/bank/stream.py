"""Row copies beside the computation: a second CUDA stream, or nothing where there is no CUDA.

Copies are queued after what the computing stream was given before, so a row leaves a slot with its last update and the
slot's next row arrives after it. The computing stream waits for them only when it is about to read such a slot; the
host only before it reads or writes host rows itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class SideStream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copying = False
        self._unread = False

    @contextlib.contextmanager
    def copies(self) -> Iterator[None]:
        """Copies issued inside run beside the computation."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        self._copying = self._unread = True
        with torch.cuda.stream(self._stream):
            yield

    def arrive(self) -> None:
        """What is computed from here on sees the copies made so far."""
        if self._stream is not None and self._unread:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._unread = False

    def settle(self) -> None:
        """Wait until the host may touch the host side of every copy."""
        if self._stream is not None and self._copying:
            self._stream.synchronize()
            self._copying = False
