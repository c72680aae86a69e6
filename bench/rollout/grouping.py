"""Many rows of more adapters than there are slots: sent by adapter against as they come, mixed."""

from __future__ import annotations

import asyncio
import itertools
import pathlib
import tempfile
import time
from typing import Any

from allele.residency.space import pages
from allele_rollout.gateway.sampler import Row, Sampler
from bench.report import Report
from bench.rollout.engines import PROMPT, SHAPE
from bench.rollout.parts import BareEngine, Shelf, gateway


class _Ready:
    """A watch whose engine is there."""

    def require(self) -> None: ...

    def suspect(self) -> None:
        raise SystemExit("the engine is gone")

    async def again(self) -> None:
        raise SystemExit("the engine lost its adapters")


async def ours(url: str, *, slots: int, order: list[int], sampling: dict[str, Any], rounds: int) -> float:
    shelf = Shelf()
    adapters = {i: shelf.adapter(i) for i in set(order)}
    capacity = 2 * len(adapters) * pages(SHAPE.packed_bytes)
    async with gateway(url, slots=slots, capacity=capacity) as (client, _, dispatcher):
        sampler = Sampler(client, dispatcher, _Ready())  # type: ignore[arg-type]
        rows = [Row(adapters[i], PROMPT) for i in order]
        seconds = []
        for _ in range(rounds + 1):  # the first loads them
            begun = time.perf_counter()
            outcomes = await sampler.run(rows, sampling)
            seconds.append(time.perf_counter() - begun)
            assert all(isinstance(o, dict) for o in outcomes)
    return min(seconds[1:])


async def theirs(url: str, *, order: list[int], sampling: dict[str, Any], rounds: int) -> float:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        bare = BareEngine(url, pathlib.Path(folder))
        for i in set(order):
            bare.export(i)
            await bare.name(i)
        body = {
            "input_ids": [list(PROMPT)] * len(order),
            "lora_path": [f"m{i}" for i in order],
            "sampling_params": sampling,
            "return_logprob": True,
        }
        seconds = []
        for _ in range(rounds):
            begun = time.perf_counter()
            await bare.client.generate(body)
            seconds.append(time.perf_counter() - begun)
        for i in set(order):
            await bare.unload(i)
        await bare.client.close()
    return min(seconds)


def measure(report: Report, url: str, bare_url: str, *, slots: int, rows: int, tokens: int, rounds: int) -> None:
    sampling = {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
    for factor in (1, 2, 4):
        order = list(itertools.islice(itertools.cycle(range(factor * slots)), rows))
        mine = asyncio.run(ours(url, slots=slots, order=order, sampling=sampling, rounds=rounds))
        rival = asyncio.run(theirs(bare_url, order=order, sampling=sampling, rounds=rounds))
        for way, seconds in (("by adapter", mine), ("interleaved", rival)):
            row = {"what": "batch", "adapters": factor * slots, "way": way, "seconds": seconds}
            report.rows.append(row | {"tokens/s": rows * tokens / seconds})
        report.ratios[f"grouped vs interleaved at {factor}x slots"] = rival / mine
