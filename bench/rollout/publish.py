"""N adapters from memory into the engine, until the last one has sampled a token: in bulk against one call each."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import tempfile
import time

from allele.residency.space import pages
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.client import EngineClient
from bench.report import Report
from bench.rollout.engines import PROMPT, SHAPE
from bench.rollout.parts import BareEngine, Shelf, gateway

_ONE = {"temperature": 0.0, "max_new_tokens": 1}


async def ours(url: str, *, slots: int, count: int, rounds: int) -> tuple[float, float]:
    """Best (published, sampled) seconds; each round publishes others, and evicts those of the round before."""
    found = []
    async with gateway(url, slots=slots, capacity=2 * count * pages(SHAPE.packed_bytes)) as (client, residency, _):
        for r in range(rounds + 1):
            shelf = Shelf()
            adapters = [shelf.adapter(r * count + i) for i in range(count)]

            async def hold(adapter: Adapter, stack: contextlib.AsyncExitStack) -> str:
                return await stack.enter_async_context(residency.hold(adapter))

            async with contextlib.AsyncExitStack() as stack:
                begun = time.perf_counter()
                names = await asyncio.gather(*(hold(a, stack) for a in adapters))
                published = time.perf_counter() - begun
                await _sample(client, names[-1])
                found.append((published, time.perf_counter() - begun))
    return min(found[1:], key=lambda pair: pair[1])  # the first maps the file, and works the layout out


async def theirs(url: str, *, count: int) -> tuple[float, float, float]:
    """(published, sampled, unloaded) seconds of one call each, one after the other: the engine takes one at a time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        bare = BareEngine(url, pathlib.Path(folder))
        for i in range(count):
            bare.export(i)
        begun = time.perf_counter()
        for i in range(count):
            name = await bare.name(i)
        published = time.perf_counter() - begun
        await _sample(bare.client, name)
        sampled = time.perf_counter() - begun
        begun = time.perf_counter()
        for i in range(count):
            await bare.unload(i)
        unloaded = time.perf_counter() - begun
        await bare.client.close()
    return published, sampled, unloaded


async def _sample(client: EngineClient, name: str) -> None:
    await client.generate({"input_ids": list(PROMPT), "lora_path": name, "sampling_params": _ONE})


def measure(report: Report, url: str, bare_url: str, *, slots: int, counts: list[int], rounds: int) -> None:
    for count in counts:
        published, sampled = asyncio.run(ours(url, slots=slots, count=count, rounds=rounds))
        their_published, their_sampled, unloaded = asyncio.run(theirs(bare_url, count=count))
        report.rows.append({"what": "publish", "adapters": count, "way": "bulk", "seconds": published})
        report.rows.append({"what": "publish", "adapters": count, "way": "one call each", "seconds": their_published})
        report.rows.append({"what": "unload", "adapters": count, "way": "one call each", "seconds": unloaded})
        report.rows.append({"what": "publish to sampled", "adapters": count, "way": "bulk", "seconds": sampled})
        report.rows.append(
            {"what": "publish to sampled", "adapters": count, "way": "one call each", "seconds": their_sampled}
        )
        report.ratios[f"publish {count} to sampled vs one call each"] = their_sampled / sampled
