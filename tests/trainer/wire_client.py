"""A driver's side of the wire, written on the wire types alone."""

from __future__ import annotations

from collections.abc import Sequence

import aiohttp
from pydantic import BaseModel

from allele.protocol import commands as c
from allele.protocol.errors import CODES, ErrorReply, ProtocolError, raise_reply
from allele.protocol.losses import PolicyLoss
from tests.trainer.trainer_parts import NAMESPACE, POPULATION, Example, Rig, adapter, batch, examples, start

MEMBERS = ("a", "b")
FOUND = examples(MEMBERS, each=3, vocab=96)


class Client:
    """What the driver of one run sends."""

    def __init__(self, rig: Rig, url: str, session: aiohttp.ClientSession, *, run: str = "run") -> None:
        self.rig, self.url, self.session = rig, url.rstrip("/"), session
        self.run, self.epoch = run, 1
        self.incarnation = ""
        self.seq = 0

    async def post(self, name: str, body: str | bytes) -> bytes:
        async with self.session.post(f"{self.url}/v1/{name}", data=body) as answer:
            reply = await answer.read()
            if answer.status != 200:
                parsed = ErrorReply.model_validate_json(reply)
                assert answer.status == CODES.get(parsed.code, ProtocolError).status
                raise_reply(parsed)
            return reply

    async def get(self, path: str) -> str:
        async with self.session.get(f"{self.url}{path}") as answer:
            assert answer.status == 200
            return await answer.text()

    async def reset(self, *, epoch: int = 1, members: tuple[str, ...] = MEMBERS) -> None:
        starts = tuple(start(m, adapter(), seed=i) for i, m in enumerate(members))
        command = c.Reset(run=self.run, epoch=epoch, namespace=NAMESPACE, population=POPULATION, members=starts)
        done = c.ResetDone.model_validate_json(await self.send("reset", command))
        self.incarnation, self.epoch, self.seq = done.incarnation, epoch, 0

    def header(self, seq: int, **other: object) -> c.Header:
        mine = {"run": self.run, "epoch": self.epoch, "incarnation": self.incarnation, "seq": seq}
        return c.Header.model_validate(mine | other)

    async def admit(self, seq: int, *members: str, **other: object) -> bytes:
        return await self.send("admit", c.Admit(header=self.header(seq, **other), members=members or MEMBERS))

    async def forward_backward(self, seq: int, found: Sequence[Example] = FOUND) -> bytes:
        return await self.post(
            "forward_backward", batch(c.ForwardBackward(header=self.header(seq), losses=(PolicyLoss(),)), found)
        )

    async def optim_step(self, seq: int, rate: float = 1e-2, members: Sequence[str] = MEMBERS) -> bytes:
        rates = dict.fromkeys(members, rate)
        return await self.send("optim_step", c.OptimStep(header=self.header(seq), learning_rates=rates))

    async def send(self, name: str, command: BaseModel) -> bytes:
        return await self.post(name, command.model_dump_json())

    async def step(self, found: Sequence[Example], *, rate: float = 5e-3) -> c.ForwardBackwardDone:
        """Admission, pass and step of all members in `found`, numbered on."""
        members = tuple(dict.fromkeys(e.member for e in found))
        await self.admit(self.seq + 1, *members)
        done = await self.forward_backward(self.seq + 2, found)
        await self.optim_step(self.seq + 3, rate, members)
        self.seq += 3
        return c.ForwardBackwardDone.model_validate_json(done)
