"""Batches to the engine: rows of one adapter go together, each with its own outcome.

The engine's LoRA kernels merge only neighbours of one adapter, and swap adapters that do not fit its slots; so each
adapter's rows are calls of their own, and the dispatcher says when. The engine refuses a whole call for one bad row:
such a call is halved until only that row fails.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from allele.protocol.errors import ProtocolError
from allele_rollout.gateway.adapter import Adapter
from allele_rollout.gateway.client import EngineClient, EngineGone, EngineRefused
from allele_rollout.gateway.dispatch import Dispatcher
from allele_rollout.gateway.watch import EngineWatch

ROWS = 128
"""Rows of a call: enough to fill a batch, few enough that adapters with many rows do not keep their slots for long."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence for the engine; `adapter` None is the bare base."""

    adapter: Adapter | None
    input_ids: Sequence[int]
    logprob_start: int = -1
    """First prompt position whose logprob is wanted; -1: only those of the output."""
    prefix: str = ""
    """Of its request id at the engine."""
    experts: bool = False
    """Whether the experts of its tokens are wanted."""


Outcome = Mapping[str, Any] | ProtocolError
"""The engine's answer to a row, or why there is none."""


class Sampler:
    """Runs rows on one engine."""

    def __init__(self, engine: EngineClient, dispatcher: Dispatcher, watch: EngineWatch) -> None:
        self._engine = engine
        self._dispatcher = dispatcher
        self._watch = watch

    async def run(self, rows: Sequence[Row], sampling: Mapping[str, Any]) -> list[Outcome]:
        """Outcomes in the order of `rows`. Raises Unavailable without an engine."""
        self._watch.require()
        outcomes: dict[int, Outcome] = {}
        parts = calls([r.adapter for r in rows], rows=ROWS)
        async with asyncio.TaskGroup() as tasks:
            for adapter, part in parts:
                tasks.create_task(self._part(adapter, [rows[i] for i in part], part, sampling, outcomes))
        gone = next((o for o in outcomes.values() if isinstance(o, EngineGone)), None)
        if gone is not None:
            self._watch.suspect()
            raise gone
        return [outcomes[i] for i in range(len(rows))]

    async def _part(
        self,
        adapter: Adapter | None,
        rows: list[Row],
        places: Sequence[int],
        sampling: Mapping[str, Any],
        outcomes: dict[int, Outcome],
    ) -> None:
        try:
            found = await self._call(adapter, rows, sampling)
        except ProtocolError as e:
            found = [e] * len(rows)
        outcomes.update(zip(places, found, strict=True))

    async def _call(self, adapter: Adapter | None, rows: list[Row], sampling: Mapping[str, Any]) -> list[Outcome]:
        for attempt in (1, 2):
            async with self._dispatcher.turn(adapter, cost=len(rows)) as name:
                try:
                    return await self._batch(rows, name, sampling)
                except EngineRefused as e:
                    if attempt == 2 or not e.unknown_adapter:
                        raise
            await self._watch.again()  # the engine restarted and answers already
        raise AssertionError("the second attempt returns or raises")

    async def _batch(self, rows: list[Row], name: str | None, sampling: Mapping[str, Any]) -> list[Outcome]:
        body = {
            "input_ids": [list(r.input_ids) for r in rows],
            "lora_path": [name] * len(rows),
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": [r.logprob_start for r in rows],
            # New ones for each try: after a refusal the engine may still know those of the rows before the bad one.
            "rid": [f"{r.prefix}{uuid.uuid4().hex}" for r in rows],
            "return_routed_experts": any(r.experts for r in rows),
        }
        try:
            return list(await self._engine.generate(body))
        except EngineRefused as e:
            if e.unknown_adapter:
                raise
            if len(rows) == 1:
                return [e]
        half = len(rows) // 2
        return [*await self._batch(rows[:half], name, sampling), *await self._batch(rows[half:], name, sampling)]


def calls(adapters: Sequence[Adapter | None], *, rows: int) -> list[tuple[Adapter | None, list[int]]]:
    """(adapter, row numbers) of each call: adapters in order of first appearance, at most `rows` rows each."""
    found: dict[Adapter | None, list[int]] = {}
    for row, adapter in enumerate(adapters):
        found.setdefault(adapter, []).append(row)
    return [(a, part[i : i + rows]) for a, part in found.items() for i in range(0, len(part), rows)]
