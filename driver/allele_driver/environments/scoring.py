"""An environment in a process of its own: what it raises is a dropped sample, what hangs is killed.

    driver ── Start, Draw, Judge ──► worker (user code)
           ◄── Drawn, Score, Failed ──

Calls are answered in order, each within the timeout after the one before. A worker that takes longer, or dies, is
replaced; the sample that it was busy with is dropped, later ones are scored by the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

from allele_driver.environments import Lesson, MemberView, Prompt, Score
from allele_driver.environments.calls import (
    LENGTH,
    Call,
    Draw,
    Drawn,
    Failed,
    Give,
    Given,
    Judge,
    Start,
    Started,
    Text,
    dump,
    load,
)
from allele_driver.environments.load import EnvironmentLoadError
from allele_driver.rollouts import Drawn as DrawnSample

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""User code may import large libraries."""

HANGS_PER_MEMBER = 3
"""Hung samples of a member in one batch after which its others are dropped unscored: each costs the whole timeout."""


WINDOW = 64
"""Samples sent before the first answer is awaited: a round trip for each costs more than most rewards."""

Item = tuple[MemberView, Prompt, DrawnSample]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Why a sample has no reward."""

    reason: str
    """One word for counting: raised, hung, died, skipped."""
    message: str


class EnvironmentFailed(Exception):
    """Prompts could not be had from user code."""


class Scorer:
    """One environment. Calls are serialised; `start` before, `close` after."""

    def __init__(self, start: Start, *, timeout: float) -> None:
        self._start = start
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self.code_digest = ""
        """sha256 of the environment's source; known after `start`, as is `data_digest`."""
        self.data_digest = ""

    async def start(self) -> None:
        """Raises EnvironmentLoadError when user code does not load or fit."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "allele_driver.environments.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        self._process = process
        try:
            self._send(process, self._start)
            answer = await asyncio.wait_for(self._receive(process), START_SECONDS)
        except (TimeoutError, EOFError) as e:
            await self.close()
            raise EnvironmentLoadError(
                f"environment {self._start.path!r}: expected a worker within {START_SECONDS:g} s, found "
                f"{'none' if isinstance(e, TimeoutError) else f'exit code {process.returncode}'}"
            ) from e
        if isinstance(answer, Failed):
            await self.close()
            raise EnvironmentLoadError(f"{answer.reason}\n{answer.traceback}")
        assert isinstance(answer, Started), f"worker: expected Started, found {answer!r:.200}"
        self.code_digest, self.data_digest = answer.code_digest, answer.data_digest

    async def close(self) -> None:
        """Kill the worker: it holds nothing worth saving."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def prompts(self, member: MemberView, *, seed: int, n: int, held_out: bool) -> tuple[Prompt, ...]:
        """Raises EnvironmentFailed with the traceback of user code, or that it hung."""
        answer = await self._told_or_failed("prompts", member, Draw(member, seed, n, held_out))
        assert isinstance(answer, Drawn), f"worker: expected Drawn, found {answer!r:.200}"
        return answer.prompts

    async def given(
        self, member: MemberView, *, seed: int, n: int, what: Literal["answers", "pairs"]
    ) -> tuple[Text, ...]:
        """Answers, or pairs as two texts each. Raises EnvironmentFailed."""
        answer = await self._told_or_failed(what, member, Give(member, seed, n, what))
        assert isinstance(answer, Given), f"worker: expected Given, found {answer!r:.200}"
        return answer.texts

    async def _told_or_failed(self, what: str, member: MemberView, call: Call) -> Any:
        async with self._lock:
            process = await self._running()
            self._send(process, call)
            answer = await self._answer(process)
        if isinstance(answer, Failed | Dropped):
            message = f"{answer.reason}\n{answer.traceback}" if isinstance(answer, Failed) else answer.message
            raise EnvironmentFailed(f"{what} of {member.name}: {message}")
        return answer

    async def scores(self, items: Sequence[Item]) -> list[Score | Dropped]:
        """In the order of `items`."""
        return await self._judged(items, teach=0)

    async def lessons(self, items: Sequence[Item], *, top_k: int) -> list[Lesson | Dropped]:
        """What the environment teaches about completions, in the order of `items`."""
        return await self._judged(items, teach=top_k)

    async def _judged(self, items: Sequence[Item], *, teach: int) -> list[Any]:
        """Scores, or lessons with `teach` tokens at each place."""
        found: list[Any] = []
        hangs: dict[str, int] = {}
        async with self._lock:
            while len(found) < len(items):
                rest = items[len(found) :]
                skipped = _leading(rest, lambda m: hangs.get(m, 0) >= HANGS_PER_MEMBER)
                if skipped:
                    found += [Dropped("skipped", f"{HANGS_PER_MEMBER} samples hung before it")] * skipped
                    continue
                window = rest[: min(WINDOW, _leading(rest, lambda m: hangs.get(m, 0) < HANGS_PER_MEMBER))]
                async for result in self._window(window, teach):
                    member = items[len(found)][0].name
                    found.append(self._told(member, result, teach))
                    if isinstance(result, Dropped) and result.reason == "hung":
                        hangs[member] = hangs.get(member, 0) + 1
        return found

    async def _window(self, items: Sequence[Item], teach: int) -> AsyncIterator[Any]:
        """Answers to some samples, sent all at once; ends early after one that hung or died."""
        process = await self._running()
        for member, prompt, sample in items:
            self._send(process, Judge(member, prompt, sample.ids, sample.finish, teach))
        for _ in items:
            answer = await self._answer(process)
            yield answer
            if isinstance(answer, Dropped):
                return

    def _told(self, member: str, answer: Any, teach: int) -> Score | Lesson | Dropped:
        if isinstance(answer, Lesson if teach else Score):
            found: Score | Lesson = answer
            return found
        if isinstance(answer, Failed):
            answer = Dropped("raised", f"{answer.reason}\n{answer.traceback}")
        assert isinstance(answer, Dropped), f"worker: expected a Score or a Lesson, found {answer!r:.200}"
        where = f"{self._start.path}.{'teach' if teach else 'score'} of {member}"
        log.warning("sample dropped: %s %s: %s", where, answer.reason, answer.message, extra={"member": member})
        return answer

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            await self.start()
        assert self._process is not None, "start leaves a process or raises"
        return self._process

    async def _answer(self, process: asyncio.subprocess.Process) -> Any:
        """The worker's next answer, or Dropped when it hung or died."""
        try:
            return await asyncio.wait_for(self._receive(process), self._timeout)
        except TimeoutError:
            await self.close()
            return Dropped("hung", f"no answer in {self._timeout:g} s; the worker was killed")
        except EOFError:
            await self.close()
            return Dropped("died", f"the worker ended with exit code {process.returncode}")
        except BaseException:
            await self.close()  # cancelled between call and answer: the next answer would be taken for another's
            raise

    def _send(self, process: asyncio.subprocess.Process, call: Call) -> None:
        """Not drained: the worker may have to be read from before it takes more."""
        assert process.stdin is not None, "made with pipes"
        process.stdin.write(dump(call))

    async def _receive(self, process: asyncio.subprocess.Process) -> Any:
        assert process.stdout is not None, "made with pipes"
        try:
            head = await process.stdout.readexactly(LENGTH.size)
            data = await process.stdout.readexactly(LENGTH.unpack(head)[0])
        except (asyncio.IncompleteReadError, ConnectionError) as e:
            raise EOFError from e
        return load(data)


def _leading(items: Sequence[Item], holds: Callable[[str], bool]) -> int:
    """How many items from the first on are of members for which `holds`."""
    return next((i for i, (member, _, _) in enumerate(items) if not holds(member.name)), len(items))
