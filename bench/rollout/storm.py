"""Warm traffic while a thousand adapters are published again and again: does any request stand still?"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import tempfile
import time

import aiohttp
import numpy as np

from allele.residency.space import pages
from bench.report import Report
from bench.rollout.engines import SHAPE
from bench.rollout.first_token import traffic
from bench.rollout.parts import BareEngine, Shelf, first_token, gateway


async def ours(
    url: str, *, slots: int, count: int, clients: int, seconds: float, tokens: int
) -> tuple[list[float], list[float], int]:
    """(first tokens without a storm, and in it; adapters published)."""
    shelf = Shelf()
    warm = [shelf.adapter(i) for i in range(slots)]
    capacity = (2 * count + slots) * pages(SHAPE.packed_bytes)
    published = 0
    async with (
        gateway(url, slots=slots, capacity=capacity) as (_, residency, dispatcher),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3)) as session,
    ):

        async def ask(i: int) -> float:
            begun = time.monotonic()
            async with dispatcher.turn(warm[i]) as name:
                first, _ = await first_token(session, url, name, tokens=tokens)
            return first - begun

        async def load(i: int) -> None:
            async with residency.hold(shelf.adapter(i)):
                pass

        async def storm() -> None:
            nonlocal published
            while True:
                numbers = range(slots + published, slots + published + count)
                await asyncio.gather(*map(load, numbers))
                published += count
                await asyncio.sleep(0.5)

        async def run() -> list[float]:
            return await traffic(ask, adapters=slots, clients=clients, seconds=seconds, seed=2)

        await run()
        calm = await run()
        task = asyncio.create_task(storm())
        found = await run()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return calm, found, published


async def theirs(
    url: str, *, slots: int, count: int, clients: int, seconds: float, tokens: int
) -> tuple[list[float], list[float], int]:
    published = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        bare = BareEngine(url, pathlib.Path(folder))
        for i in range(slots + count):
            bare.export(i)
        warm = [await bare.name(i) for i in range(slots)]
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3)) as session:

            async def ask(i: int) -> float:
                begun = time.monotonic()
                first, _ = await first_token(session, url, warm[i], tokens=tokens)
                return first - begun

            async def storm() -> None:
                nonlocal published
                while True:
                    for i in range(slots, slots + count):
                        if i in bare.loaded:
                            await bare.unload(i)
                        await bare.name(i)
                        published += 1

            async def run() -> list[float]:
                return await traffic(ask, adapters=slots, clients=clients, seconds=seconds, seed=2)

            calm = await run()
            task = asyncio.create_task(storm())
            found = await run()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for i in list(bare.loaded):
            await bare.unload(i)
        await bare.client.close()
    return calm, found, published


def measure(
    report: Report, url: str, bare_url: str, *, slots: int, count: int, clients: int, seconds: float, tokens: int
) -> None:
    load = {"slots": slots, "count": count, "clients": clients, "seconds": seconds, "tokens": tokens}
    for way, (calm, found, published) in (
        ("allele", asyncio.run(ours(url, **load))),  # type: ignore[arg-type]
        ("bare", asyncio.run(theirs(bare_url, **load))),  # type: ignore[arg-type]
    ):
        limit = stall(calm)
        stalls = sum(t > limit for t in found)
        for what, times in (("calm", calm), ("storm", found)):
            p50, p95 = np.percentile(times, [50, 95])
            row = {"what": f"warm first token, {what}", "way": way, "seconds": p95, "p50": p50}
            report.rows.append(row | {"requests/s": len(times) / seconds})
        row = {"what": f"stalls over {limit:.2f} s of {len(found)}", "way": way, "seconds": max(found)}
        report.rows.append(row | {"stalls": stalls, "adapters": published})
        if way == "allele":
            report.ratios["warm requests in a publish storm without a stall"] = 1 - stalls / len(found)


def stall(calm: list[float]) -> float:
    """What counts as one: a second, or four times the p95 of calm traffic where that is more."""
    return max(1.0, 4 * float(np.percentile(calm, 95)))
