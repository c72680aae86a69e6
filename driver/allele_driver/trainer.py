"""Client of the trainer: one run's commands, numbered.

A command whose answer was lost is sent again under its number; the trainer executes it once. What a retry cannot heal,
a restarted trainer or a newer driver, comes out as UnknownIncarnation or StaleEpoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import aiohttp

from allele.protocol.commands import (
    Admit,
    Admitted,
    Export,
    ExportDone,
    ForwardBackward,
    ForwardBackwardDone,
    Header,
    MemberStart,
    OptimStep,
    OptimStepDone,
    ProbeSequence,
    Reset,
    ResetDone,
    SaveState,
    SaveStateDone,
)
from allele.protocol.losses import LossSpec
from allele.protocol.samples import MEDIA_TYPE, TRAIN, encode
from allele.protocol.wire import Wire
from allele_driver import wire
from allele_driver.patience import Patience
from allele_driver.rollouts import TrainRow

Done = TypeVar("Done", bound=Wire)


class Trainer:
    """One at a time: commands of a run are a sequence."""

    def __init__(self, url: str, *, session: aiohttp.ClientSession, run: str, patience: Patience) -> None:
        self._url = url.rstrip("/")
        self._session = session
        self._run = run
        self._patience = patience
        self._epoch = 0
        self._seq = 0
        self.incarnation = ""
        """Of the trainer that knows our rows; empty before the first reset."""

    async def reset(self, *, epoch: int, namespace: str, population: str, members: Sequence[MemberStart]) -> ResetDone:
        """Forget all rows of the run; they come back from the store as `members` say."""
        body = Reset(run=self._run, epoch=epoch, namespace=namespace, population=population, members=tuple(members))
        done = await self._send("reset", body.model_dump_json().encode(), ResetDone)
        self._epoch, self._seq, self.incarnation = epoch, 0, done.incarnation
        return done

    async def admit(self, members: Sequence[str], *, following: Sequence[str] = ()) -> Admitted:
        """`following`: the wave after this one; its rows come in while this one computes."""
        body = Admit(header=self._next(), members=tuple(members), next=tuple(following))
        return await self._command("admit", body, Admitted)

    async def forward_backward(self, turns: Sequence[tuple[LossSpec, Sequence[TrainRow]]]) -> ForwardBackwardDone:
        """One pass over the rows of all members, each with its own loss."""
        losses = {loss: i for i, loss in enumerate(dict.fromkeys(loss for loss, _ in turns))}
        rows = [row for _, some in turns for row in some]
        columns: dict[str, list[object]] = {
            f.name: [getattr(r, f.name) for r in rows] for f in dataclasses.fields(TrainRow)
        }
        columns["loss"] = [losses[loss] for loss, some in turns for _ in some]
        data = encode(ForwardBackward(header=self._next(), losses=tuple(losses)), TRAIN, columns)
        return await self._send("forward_backward", data, ForwardBackwardDone, media=MEDIA_TYPE)

    async def optim_step(self, learning_rates: dict[str, float]) -> OptimStepDone:
        body = OptimStep(header=self._next(), learning_rates=learning_rates)
        return await self._command("optim_step", body, OptimStepDone)

    async def export(self, members: Sequence[str], probes: Sequence[ProbeSequence]) -> ExportDone:
        body = Export(header=self._next(), members=tuple(members), probes=tuple(probes))
        return await self._command("export", body, ExportDone)

    async def save_state(self, members: Sequence[str]) -> SaveStateDone:
        return await self._command("save_state", SaveState(header=self._next(), members=tuple(members)), SaveStateDone)

    def _next(self) -> Header:
        self._seq += 1
        return Header(run=self._run, epoch=self._epoch, incarnation=self.incarnation, seq=self._seq)

    async def _command(self, name: str, body: Wire, done: type[Done]) -> Done:
        return await self._send(name, body.model_dump_json().encode(), done)

    async def _send(self, name: str, data: bytes, done: type[Done], *, media: str = wire.JSON) -> Done:
        url = f"{self._url}/v1/{name}"
        reply = await self._patience.until("trainer", lambda: wire.post(self._session, url, data, media=media))
        return done.model_validate_json(reply)
