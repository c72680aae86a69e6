"""Time to the first token as adapters outgrow the slots, with a stated time that a cold adapter takes to arrive."""

from __future__ import annotations

import asyncio
import pathlib
import random
import tempfile
import time
from collections.abc import Awaitable, Callable

import aiohttp
import numpy as np

from allele.residency.space import pages
from bench.report import Report
from bench.rollout.engines import SHAPE
from bench.rollout.parts import BareEngine, Shelf, first_token, gateway

Ask = Callable[[int], Awaitable[float]]
"""Sends a request for an adapter; seconds until its first token."""


async def traffic(ask: Ask, *, adapters: int, clients: int, seconds: float, seed: int) -> list[float]:
    """Closed loop: each client asks for one adapter after the other, chosen evenly; seconds to each first token."""
    found: list[float] = []
    until = time.monotonic() + seconds

    async def client(dice: random.Random) -> None:
        while time.monotonic() < until:
            found.append(await ask(dice.randrange(adapters)))

    await asyncio.gather(*(client(random.Random(seed * 1000 + i)) for i in range(clients)))
    return found


async def ours(
    url: str, *, slots: int, adapters: int, host: int, clients: int, seconds: float, tokens: int, delay: float
) -> list[float]:
    shelf = Shelf(delay)
    known = [shelf.adapter(i) for i in range(adapters)]
    async with (
        gateway(url, slots=slots, capacity=host * pages(SHAPE.packed_bytes)) as (_, _, dispatcher),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3)) as session,
    ):

        async def ask(i: int) -> float:
            begun = time.monotonic()
            async with dispatcher.turn(known[i]) as name:
                first, _ = await first_token(session, url, name, tokens=tokens)
            return first - begun

        return await traffic(ask, adapters=adapters, clients=clients, seconds=seconds, seed=1)


async def theirs(url: str, *, adapters: int, host: int, clients: int, seconds: float, tokens: int) -> list[float]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        bare = BareEngine(url, pathlib.Path(folder), capacity=host)
        for i in range(adapters):
            bare.export(i)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask(i: int) -> float:
                begun = time.monotonic()
                async with bare.use(i) as name:
                    first, _ = await first_token(session, url, name, tokens=tokens)
                return first - begun

            found = await traffic(ask, adapters=adapters, clients=clients, seconds=seconds, seed=1)
        for i in bare.loaded:
            await bare.unload(i)
        await bare.client.close()
    return found


def measure(
    report: Report, url: str, slow_url: str, *, slots: int, clients: int, seconds: float, tokens: int, delay: float
) -> None:
    """Both keep as many adapters in memory as there are slots. Any other takes `delay` to be read: by our gateway from
    the store, by the bare engine from its folder."""
    for factor in (0.5, 1, 2, 4, 8):
        adapters = int(factor * slots)
        load = {"adapters": adapters, "host": slots, "clients": clients, "seconds": seconds, "tokens": tokens}
        both = {
            "allele": asyncio.run(ours(url, slots=slots, delay=delay, **load)),  # type: ignore[arg-type]
            "bare": asyncio.run(theirs(slow_url, **load)),  # type: ignore[arg-type]
        }
        for way, found in both.items():
            p50, p95 = np.percentile(found, [50, 95])
            row = {"what": f"first token at {factor:g}x slots", "adapters": adapters, "way": way, "seconds": p95}
            report.rows.append(row | {"p50": p50, "requests/s": len(found) / seconds})
        ratio = float(np.percentile(both["bare"], 95) / np.percentile(both["allele"], 95))
        report.ratios[f"first token p95 at {factor:g}x slots vs bare"] = ratio
