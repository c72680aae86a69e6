"""The queue: one worker a key, no lost wish, backoff that a hot key cannot skip, one timer a key."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from allele_operator.cluster.errors import ApiError, FenceShut
from allele_operator.workqueue import WorkQueue

Handle = Callable[[str], Awaitable[None]]


def queue(backoff: float = 0.02) -> WorkQueue[str]:
    return WorkQueue(backoff=backoff, longest=1.0, jitter=lambda low, high: high)


@contextlib.asynccontextmanager
async def workers(q: WorkQueue[str], handle: Handle, count: int = 4) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(q.work(handle)) for _ in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_key_added_many_times_while_it_waits_runs_once() -> None:
    q, runs = queue(), []

    async def handle(key: str) -> None:
        runs.append(key)

    for _ in range(100):
        q.add("a")
    q.add("b")
    async with workers(q, handle):
        await until(lambda: len(runs) >= 2 and not q.depth)
    assert sorted(runs) == ["a", "b"]


async def test_a_key_added_while_it_runs_runs_again_and_never_twice_at_once() -> None:
    q, runs, at_once = queue(), 0, 0
    go = asyncio.Event()

    async def handle(_: str) -> None:
        nonlocal runs, at_once
        at_once += 1
        assert at_once == 1
        runs += 1
        await go.wait()
        at_once -= 1

    async with workers(q, handle):
        q.add("a")
        await until(lambda: runs == 1)
        q.add("a")
        q.add("a")
        await asyncio.sleep(0)
        assert runs == 1
        go.set()
        await until(lambda: runs == 2)


async def test_failures_back_off_exponentially_and_success_forgets_them() -> None:
    q, times, failing = queue(backoff=0.02), [], True
    loop = asyncio.get_running_loop()

    async def handle(_: str) -> None:
        times.append(loop.time())
        if failing:
            raise ValueError("not yet")

    async with workers(q, handle):
        q.add("a")
        await until(lambda: len(times) == 4)
        assert q.failures("a") >= 3
        failing = False
        await until(lambda: not q.failing)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] >= 0.019 and gaps[1] >= 0.039 and gaps[2] >= 0.079


async def test_a_change_during_a_failure_does_not_skip_the_delay() -> None:
    q, times = queue(backoff=0.1), []
    loop = asyncio.get_running_loop()

    async def handle(key: str) -> None:
        times.append(loop.time())
        if len(times) == 1:
            q.add(key)
            raise ValueError("refused")

    async with workers(q, handle):
        q.add("a")
        await until(lambda: len(times) == 2)
    assert times[1] - times[0] >= 0.099


async def test_the_servers_retry_after_is_honoured() -> None:
    q, times = queue(backoff=0.001), []
    loop = asyncio.get_running_loop()

    async def handle(_: str) -> None:
        times.append(loop.time())
        if len(times) == 1:
            raise ApiError(429, "TooManyRequests", "slow down", retry_after=0.15)

    async with workers(q, handle):
        q.add("a")
        await until(lambda: len(times) == 2)
    assert times[1] - times[0] >= 0.149


async def test_the_earlier_of_two_delayed_wishes_wins_and_the_key_runs_once() -> None:
    q, runs = queue(), []

    async def handle(key: str) -> None:
        runs.append(key)

    async with workers(q, handle):
        q.add_later("a", seconds=30)
        q.add_later("a", seconds=0.01)
        q.add_later("a", seconds=20)
        await until(lambda: runs == ["a"])
        q.add_later("b", seconds=0.03)
        q.add("b")
        await until(lambda: runs == ["a", "b"])
        await asyncio.sleep(0.05)
    assert runs == ["a", "b"]


async def test_a_shut_fence_ends_the_worker() -> None:
    q = queue()

    async def handle(_: str) -> None:
        raise FenceShut("lost")

    q.add("a")
    with pytest.raises(FenceShut):
        await asyncio.wait_for(q.work(handle), 5)


async def test_the_age_of_the_longest_waiting_key_is_known() -> None:
    now = 0.0
    q: WorkQueue[str] = WorkQueue(backoff=1, longest=1, clock=lambda: now)
    assert q.oldest == 0
    q.add("a")
    now = 100.0
    q.add("b")
    assert q.oldest == 100 and q.depth == 2
