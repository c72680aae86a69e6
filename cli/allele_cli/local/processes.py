"""Containers as local processes: what kubelet does for a pod with restartPolicy OnFailure, on this machine.

Each process leads a session of its own, so that stopping it also stops what it started (SGLang's workers).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from allele_cli.failure import Failure

BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Delay before the n-th restart; the last one repeats."""
INVALID_INPUT = 2
"""Exit code of a role that was given something wrong: starting it again changes nothing."""
GRACE_SECONDS = 10.0
"""From SIGTERM to SIGKILL when stopping."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One container: its argv and whole environment."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    restarts: int
    """Restarts allowed after a failure; beyond that the supervisor gives up."""


class Process:
    """A container that is started again when it fails; `done` resolves with its exit code when it is not."""

    def __init__(self, spec: Spec, *, logs: Path, on_restart: Callable[[str, int], None]) -> None:
        self.spec = spec
        self.log = logs / f"{spec.name}.log"
        self.restarts = 0
        self.pid: int | None = None
        self._on_restart = on_restart
        self._stopping = False

    async def run(self) -> int:
        """Returns 0 when the process ended well. Raises Failure when it failed too often, or for good."""
        while True:
            started = time.monotonic()
            code = await self._once()
            if code == 0 or self._stopping:
                return code
            if self.restarts >= self.spec.restarts or code == INVALID_INPUT:
                raise Failure(
                    f"{self.spec.name}: ended with exit code {code}; last lines of {self.log}:\n{self.tail()}"
                )
            delay = BACKOFF_SECONDS[min(self.restarts, len(BACKOFF_SECONDS) - 1)]
            self.restarts += 1
            self._on_restart(self.spec.name, code)
            await asyncio.sleep(max(0.0, delay - (time.monotonic() - started)))

    async def _once(self) -> int:
        with self.log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *self.spec.argv, env=dict(self.spec.env), stdout=out, stderr=out, start_new_session=True
            )
        self.pid = process.pid
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                await self._end(process)
            self.pid = None

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        self._stopping = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.shield(asyncio.wait_for(process.wait(), GRACE_SECONDS))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


async def run_once(spec: Spec, *, logs: Path) -> None:
    """An init container: runs to its end. Raises Failure when it fails."""
    process = Process(dataclasses.replace(spec, restarts=0), logs=logs, on_restart=lambda *_: None)
    await process.run()
