"""Batches to the engine: grouped by adapter, cut to its slots, each row with its own outcome.

The engine refuses a whole batch for one bad row; such a batch is halved until only that row fails.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from allele.protocol.errors import ProtocolError
from allele_rollout.gateway.client import EngineClient, EngineGone, EngineRefused
from allele_rollout.gateway.grouping import calls, groups
from allele_rollout.gateway.residency import Adapter, Residency
from allele_rollout.gateway.watch import EngineWatch


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

    def __init__(self, engine: EngineClient, residency: Residency, watch: EngineWatch, *, slots: int) -> None:
        self._engine = engine
        self._residency = residency
        self._watch = watch
        self._slots = slots

    async def run(self, rows: Sequence[Row], sampling: Mapping[str, Any]) -> list[Outcome]:
        """Outcomes in the order of `rows`. Raises Unavailable without an engine."""
        self._watch.require()
        outcomes: dict[int, Outcome] = {}
        for part in calls(groups([r.adapter for r in rows]), slots=self._slots):
            for attempt in (1, 2):
                try:
                    outcomes.update(await self._part(rows, part, sampling))
                    break
                except EngineGone:
                    self._watch.suspect()
                    raise
                except EngineRefused:  # an unknown adapter: the engine restarted and answers already
                    if attempt == 2:
                        raise
                    self._residency.forget()
        return [outcomes[i] for i in range(len(rows))]

    async def _part(
        self, rows: Sequence[Row], part: Mapping[Adapter | None, list[int]], sampling: Mapping[str, Any]
    ) -> dict[int, Outcome]:
        async with self._residency.hold([a for a in part if a is not None]) as held:
            failed: dict[int, Outcome] = {i: held.failed[a] for a in held.failed for i in part[a]}
            order = [i for a, members in part.items() if a is None or a in held.names for i in members]
            names = [None if (a := rows[i].adapter) is None else held.names[a] for i in order]
            served = await self._batch([rows[i] for i in order], names, sampling) if order else []
            return failed | dict(zip(order, served, strict=True))

    async def _batch(self, rows: list[Row], names: list[str | None], sampling: Mapping[str, Any]) -> list[Outcome]:
        body = {
            "input_ids": [list(r.input_ids) for r in rows],
            "lora_path": names,
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
        return [
            *await self._batch(rows[:half], names[:half], sampling),
            *await self._batch(rows[half:], names[half:], sampling),
        ]
