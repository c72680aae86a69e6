"""Over HTTP: drivers of several runs at once share micro-batches, and none of them can tell."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from allele.protocol.errors import InvalidRequest, ProtocolError, UnknownIncarnation
from allele_trainer.rl.packing import units_of
from allele_trainer.server.app import Server
from allele_trainer.server.cost import CostModel
from allele_trainer.server.metrics import Metrics
from allele_trainer.server.work import Part
from tests.trainer.trainer_parts import Example, Rig, adapter, examples, same_rows, start
from tests.trainer.wire_client import Client

RUNS = ("x", "y", "z")
MEMBERS = ("a", "b", "c")


class Watched:
    """A server whose micro-batches can be held, to make commands wait together, and are written down."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.metrics = Metrics()
        self.server = Server(rig.trainer, incarnation="first", base_digest="sha256:base", metrics=self.metrics)
        self.gate = threading.Event()
        self.gate.set()
        self.held = False
        """Whether a micro-batch waits for the gate."""
        self.shared = 0
        """Micro-batches of several runs in the last `together`."""
        self.batches: list[list[str]] = []
        """Runs of each micro-batch, once for each of its units."""
        self.poison = ""
        """A run whose units make a micro-batch fail."""
        self._train = rig.trainer.train
        rig.trainer.train = self.train  # type: ignore[method-assign]

    def train(self, parts: Sequence[Part]) -> None:
        self.held = not self.gate.is_set()
        self.gate.wait(20)
        self.held = False
        runs = [p.key.run for p in parts]
        self.batches.append(runs)
        if self.poison in runs:
            raise RuntimeError("a kernel did not like this")
        self._train(parts)

    async def waiting(self, count: int) -> None:
        """Until so many commands are not answered."""
        while self.metrics.waiting._value.get() < count:
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is faster on a busy machine is not what is tested here."""
    monkeypatch.setattr(CostModel, "choose", lambda _self, _units: "Batched")
    monkeypatch.setattr(CostModel, "curious", lambda _self, _units: False)


@pytest.fixture
async def watched(rig: Callable[..., Rig]) -> AsyncIterator[tuple[Watched, dict[str, Client]]]:
    mine = Watched(rig(slots=12, max_tokens=128))
    async with TestServer(mine.server.app()) as running, aiohttp.ClientSession() as session:
        clients = {run: Client(mine.rig, str(running.make_url("")), session, run=run) for run in (*RUNS, "w")}
        for client in clients.values():
            await client.reset(members=MEMBERS)
        yield mine, clients
        mine.gate.set()


def found_of(run: str, step: int) -> list[Example]:
    return examples(MEMBERS, each=3, vocab=96, seed=100 * ord(run) + step)


async def together(
    watched: Watched, clients: Mapping[str, Client], runs: Sequence[str], found: dict[str, list[Example]]
) -> list[object]:
    """Send the next pass of each run while the trainer is held by a micro-batch of run w, then let it go."""
    for run in runs:
        clients[run].seq += 1
        await clients[run].admit(clients[run].seq, *MEMBERS)
    first = len(watched.batches)
    watched.gate.clear()
    holding = asyncio.create_task(clients["w"].step(found_of("w", 0)))
    while not watched.held:
        await asyncio.sleep(0.005)
    sent = [asyncio.create_task(clients[run].forward_backward(clients[run].seq + 1, found[run])) for run in runs]
    await watched.waiting(len(runs) + 1)
    watched.gate.set()
    answers = await asyncio.gather(*sent, return_exceptions=True)
    await holding
    for run, answer in zip(runs, answers, strict=True):
        clients[run].seq += isinstance(answer, bytes)
    watched.shared = sum(len(set(runs)) > 1 for runs in watched.batches[first:])
    return answers


def alone(rig: Rig, run: str, steps: Sequence[list[Example]]) -> Rig:
    rig.reset([start(m, adapter(), seed=i) for i, m in enumerate(MEMBERS)], run=run)
    for found in steps:
        rig.step(found, rate=5e-3, run=run)
    return rig


async def test_runs_that_share_micro_batches_get_the_bits_of_running_alone(
    watched: tuple[Watched, dict[str, Client]], rig: Callable[..., Rig]
) -> None:
    mine, clients = watched
    shared = 0
    for step in range(4):
        await together(mine, clients, RUNS, {run: found_of(run, step) for run in RUNS})
        shared += mine.shared
        await asyncio.gather(*(clients[run].optim_step(clients[run].seq + 1, 5e-3, MEMBERS) for run in RUNS))
        for run in RUNS:
            clients[run].seq += 1
    assert shared >= 4
    for run in RUNS:
        own = alone(rig(slots=3, max_tokens=128), run, [found_of(run, s) for s in range(4)])
        assert all(same_rows(mine.rig.row(m, run=run), own.row(m, run=run)) for m in MEMBERS), run


async def test_a_small_run_waits_for_its_share_and_not_for_a_long_one(
    watched: tuple[Watched, dict[str, Client]],
) -> None:
    mine, clients = watched
    long = [e for s in range(60) for e in found_of("x", s)]
    await clients["x"].admit(1, *MEMBERS)
    big = asyncio.create_task(clients["x"].forward_backward(2, long))
    while not mine.batches:
        await asyncio.sleep(0.005)
    for step in range(3):
        before = len(mine.batches)
        await clients["y"].step(found_of("y", step))
        since = mine.batches[before:]
        last = max(i for i, runs in enumerate(since) if "y" in runs)
        first = min(i for i, runs in enumerate(since) if "y" in runs)
        tokens = sum(e.inputs for e in found_of("y", step))
        # half of each micro-batch is its own, up to a unit that does not fit
        assert last - first + 1 <= math.ceil(tokens / 64) + 2
    assert not big.done()
    await big


async def test_a_wrong_command_is_refused_alone(
    watched: tuple[Watched, dict[str, Client]], rig: Callable[..., Rig]
) -> None:
    mine, clients = watched
    found = {run: found_of(run, 0) for run in RUNS}
    found["y"][1] = dataclasses.replace(found["y"][1], completion=[96])
    answers = await together(mine, clients, RUNS, found)
    assert isinstance(answers[1], InvalidRequest) and isinstance(answers[0], bytes) and isinstance(answers[2], bytes)
    await clients["y"].forward_backward(2, found_of("y", 0))
    for run in RUNS:
        await clients[run].optim_step(3, 5e-3, MEMBERS)
        own = alone(rig(slots=3, max_tokens=128), run, [found_of(run, 0)])
        assert all(same_rows(mine.rig.row(m, run=run), own.row(m, run=run)) for m in MEMBERS)


async def test_a_member_that_is_not_finite_spoils_no_other_run(
    watched: tuple[Watched, dict[str, Client]], rig: Callable[..., Rig]
) -> None:
    mine, clients = watched
    found = {run: found_of(run, 0) for run in RUNS}
    sick = next(i for i, e in enumerate(found["y"]) if e.member == "b")
    found["y"][sick] = dataclasses.replace(found["y"][sick], advantage=math.nan)
    await together(mine, clients, RUNS, found)
    assert mine.shared
    for run in RUNS:
        await clients[run].optim_step(3, 5e-3, MEMBERS)
        own = alone(rig(slots=3, max_tokens=128), run, [found_of(run, 0)])
        for member in MEMBERS:
            healthy = (run, member) != ("y", "b")
            assert same_rows(mine.rig.row(member, run=run), own.row(member, run=run)) == healthy
    assert mine.rig.row("b", run="y").step == 0


async def test_what_fails_a_shared_micro_batch_is_found_out_and_then_fails_alone(
    watched: tuple[Watched, dict[str, Client]],
) -> None:
    mine, clients = watched
    mine.poison = "y"
    found = {run: found_of(run, 0) for run in RUNS}
    answers = await together(mine, clients, "xy", found)
    assert mine.shared
    assert {type(a) for a in answers} == {ProtocolError}
    with pytest.raises(UnknownIncarnation, match="failed half-way"):
        await clients["x"].forward_backward(2, found_of("x", 0))
    for run in "xy":
        await clients[run].reset(epoch=2, members=MEMBERS)
    answers = await together(mine, clients, "xy", found)
    assert not mine.shared
    assert isinstance(answers[0], bytes) and type(answers[1]) is ProtocolError


async def test_a_pass_asked_for_twice_while_it_runs_is_executed_once_and_answered_twice(
    watched: tuple[Watched, dict[str, Client]],
) -> None:
    mine, clients = watched
    client = clients["x"]
    long = [e for s in range(12) for e in found_of("x", s)]
    await client.admit(1, *MEMBERS)
    mine.gate.clear()
    sent = [asyncio.create_task(client.forward_backward(2, long))]
    while not mine.held:
        await asyncio.sleep(0.005)
    sent.append(asyncio.create_task(client.forward_backward(2, long)))
    other = asyncio.create_task(client.forward_backward(2, found_of("x", 1)))
    await mine.waiting(3)
    mine.gate.set()
    with pytest.raises(InvalidRequest, match="another command, which is running"):
        await other
    assert not sent[0].done()
    first, second = await asyncio.gather(*sent)
    assert first == second == await client.forward_backward(2, long)
    units = [units_of([e for e in long if e.member == m], max_tokens=128) for m in MEMBERS]
    assert sum(len(runs) for runs in mine.batches) == sum(map(len, units)) > 2 * len(MEMBERS)


async def test_a_reset_ends_the_pass_of_the_driver_before(watched: tuple[Watched, dict[str, Client]]) -> None:
    mine, clients = watched
    client = clients["x"]
    await client.admit(1, *MEMBERS)
    long = [e for s in range(40) for e in found_of("x", s)]
    old = asyncio.create_task(client.forward_backward(2, long))
    while not mine.batches:
        await asyncio.sleep(0.005)
    newer = Client(mine.rig, client.url, client.session, run="x")
    await newer.reset(epoch=2, members=MEMBERS)
    with pytest.raises(UnknownIncarnation, match="reset while this command ran"):
        await old
    await newer.step(found_of("x", 0))
    assert mine.rig.row("a", run="x").step == 1
