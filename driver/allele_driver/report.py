"""Telling the operator (or `allele run`) how far the run is, without ever waiting for it.

Reports are whole states; only the newest is sent, so a slow or lost receiver costs nothing but freshness.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import aiohttp

from allele.protocol.progress import Progress
from allele_driver.metrics import REPORT_FAILURES

log = logging.getLogger(__name__)

TIMEOUT = aiohttp.ClientTimeout(total=5)
RETRY_SECONDS = 2.0
LAST_WORDS_SECONDS = 10.0
"""How long an ending driver tries to say so."""


class Reporter:
    """Posts the newest progress from a task of its own."""

    def __init__(self, url: str, token_file: Path | None, *, session: aiohttp.ClientSession) -> None:
        self._url = f"{url.rstrip('/')}/v1/progress"
        self._token_file = token_file
        self._session = session
        self._newest: Progress | None = None
        self._changed = asyncio.Event()
        self._sent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def report(self, progress: Progress) -> None:
        self._newest = progress
        self._sent.clear()
        self._changed.set()

    async def close(self) -> None:
        """Gives the last report a moment to arrive."""
        if self._task is None:
            return
        if self._newest is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sent.wait(), LAST_WORDS_SECONDS)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        failed = False
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._post()
            except (aiohttp.ClientError, OSError, TimeoutError) as e:
                REPORT_FAILURES.inc()
                if not failed:
                    log.warning("progress was not taken by %s: %s: %s", self._url, type(e).__name__, e)
                failed = True
                self._changed.set()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            failed = False
            if not self._changed.is_set():
                self._sent.set()

    async def _post(self) -> None:
        assert self._newest is not None, "changed is set by report"
        headers = {"Content-Type": "application/json"}
        if self._token_file is not None:
            # Kubernetes replaces projected tokens before they expire.
            token = await asyncio.to_thread(self._token_file.read_text)
            headers["Authorization"] = f"Bearer {token.strip()}"
        body = self._newest.model_dump_json().encode()
        async with self._session.post(self._url, data=body, headers=headers, timeout=TIMEOUT) as response:
            if response.status >= 300:
                text = (await response.text())[:200]
                raise aiohttp.ClientError(f"expected status 2xx, found {response.status}: {text}")
