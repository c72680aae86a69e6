"""Telling the operator (or `allele run`) how this replica is: the whole state, every ten seconds and when it matters.

Nothing waits for it. A report that is not taken is counted and the next one says it all again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp

from allele.protocol.serving import GatewayReport, GatewayStatus

_log = logging.getLogger(__name__)
EVERY = 10.0
"""Seconds between reports; the operator counts a gateway out after some that did not come."""
LOOK = 1.0
"""Seconds after which a change of engine or publish path is noticed."""
_TIMEOUT = aiohttp.ClientTimeout(total=5)


class Reporting:
    """The reports of one gateway; `run` is its background task."""

    def __init__(
        self,
        url: str,
        token_file: Path | None,
        *,
        namespace: str,
        pool: str,
        status: Callable[[], GatewayStatus],
        on_failure: Callable[[], None],
        every: float = EVERY,
        look: float = LOOK,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = f"{url.rstrip('/')}/v1/gateways"
        self._token_file = token_file
        self._namespace, self._pool = namespace, pool
        self._status = status
        self._on_failure = on_failure
        self._every, self._look = every, look
        self._clock = clock
        self._failing = False

    async def run(self) -> None:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            due, told = -float("inf"), None
            while True:
                status = self._status()
                news = (status.engine, status.publish_path, status.publish_path_message)
                if self._clock() >= due or news != told:
                    await self._tell(session, status)
                    told = news
                    # Replicas that started together do not stay together.
                    due = self._clock() + self._every * random.uniform(0.9, 1.0)
                await asyncio.sleep(self._look)

    async def _tell(self, session: aiohttp.ClientSession, status: GatewayStatus) -> None:
        try:
            brief = status.model_copy(update={"populations": {}})  # may be thousands, and the operator shows none
            await self._post(session, GatewayReport(namespace=self._namespace, pool=self._pool, status=brief))
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            self._on_failure()
            if not self._failing:
                _log.warning("The report was not taken by %s: %s: %s", self._url, type(e).__name__, e)
            self._failing = True
        else:
            self._failing = False

    async def _post(self, session: aiohttp.ClientSession, report: GatewayReport) -> None:
        headers = {"Content-Type": "application/json"}
        if self._token_file is not None:
            # Kubernetes replaces projected tokens before they expire.
            token = await asyncio.to_thread(self._token_file.read_text)
            headers["Authorization"] = f"Bearer {token.strip()}"
        body = report.model_dump_json().encode()
        async with session.post(self._url, data=body, headers=headers) as response:
            if response.status >= 300:
                text = (await response.text())[:200]
                raise aiohttp.ClientError(f"expected status 2xx, found {response.status}: {text}")
