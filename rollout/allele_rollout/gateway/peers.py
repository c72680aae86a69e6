"""What was just trained, from the trainer that has it in memory, before it could be read from the store.

Only a short cut: an answer that does not come in time, or lacks something, sends the caller to the store. Bytes are not
trusted here; the caller checks each against its digest, as it does those of the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import aiohttp

from allele.protocol.errors import InvalidRequest
from allele.protocol.packed import PackedRequest, decode_packed

_log = logging.getLogger(__name__)
_AT_ONCE = 1024
"""Digests in a request; the trainer answers as many of them as fit."""


class Peers:
    """One trainer. `count(outcome, n)` is told how many adapters were found, missing, or asked for in vain."""

    def __init__(
        self,
        url: str,
        *,
        count: Callable[[str, int], None],
        timeout: float = 2.0,
        pause: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout`: seconds that a caller waits; `pause`: seconds after a failure in which the trainer is let be."""
        self._url = f"{url.rstrip('/')}/v1/packed"
        self._count = count
        self._timeout, self._pause = timeout, pause
        self._clock = clock
        self._turn = asyncio.Lock()
        self._away_until = -float("inf")
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def fetch(self, digests: Sequence[str]) -> dict[str, bytes]:
        """Bytes by sha256 (hex), unchecked; what the trainer does not have is left out, all of it when it is away."""
        wanted = list(dict.fromkeys(digests))
        if not wanted or self._clock() < self._away_until:
            return {}
        found: dict[str, bytes] = {}
        try:
            async with asyncio.timeout(self._timeout), self._turn:
                for i in range(0, len(wanted), _AT_ONCE):
                    found |= await self._ask(wanted[i : i + _AT_ONCE])
        except (aiohttp.ClientError, OSError, TimeoutError, InvalidRequest) as e:
            self._away_until = self._clock() + self._pause
            self._count("failed", len(wanted) - len(found))
            _log.warning("Trainer %s: %s: %s; read from the store", self._url, type(e).__name__, e)
        else:
            self._count("missing", len(wanted) - len(found))
        self._count("found", len(found))
        return found

    async def _ask(self, digests: Sequence[str]) -> dict[str, bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        body = PackedRequest(digests=tuple(digests)).model_dump_json().encode()
        async with self._session.post(self._url, data=body, headers={"Content-Type": "application/json"}) as answer:
            if answer.status != 200:
                raise aiohttp.ClientError(f"expected status 200, found {answer.status}")
            data = await answer.read()
        asked = set(digests)
        return {d: b for d, b in (await asyncio.to_thread(decode_packed, data)).items() if d in asked}
