"""A trainer of two processes over HTTP: drivers' view, the same bytes, and an end when the two may have parted."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import aiohttp
import numpy as np
import psutil
import pytest

from allele.protocol import commands as c
from allele.protocol.errors import DigestMismatch, UnknownIncarnation
from allele.store import bases
from allele_trainer.model.build import BaseModel
from tests.trainer.trainer_parts import NAMESPACE, POPULATION, Rig, adapter, examples, same_rows, start
from tests.trainer.wire_client import Client

MEMBERS = ("a", "b", "c")
STARTS_WITHIN = 120
SPEC = adapter(rank=4, alpha=8)
PROBES = (c.ProbeSequence(prompt=(1, 2, 3), completion=(4, 5)),)


class Service:
    """`torchrun` with two tensor ranks, restarted twice; host memory for two rows of each."""

    def __init__(self, base: pathlib.Path, store: pathlib.Path, log: pathlib.Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "2", "-m", "allele_trainer", "--tp", "2", "--base", str(base)]
        command += ["--base-digest", bases.digest(base), "--store", f"file://{store}", "--slots", "2"]
        command += ["--host-memory", "150000", "--listen", f"127.0.0.1:{self.port}"]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
            )

    def ranks(self) -> list[psutil.Process]:
        """The trainers, by rank."""
        found = psutil.Process(self.process.pid).children()
        return sorted(found, key=lambda p: int(p.environ()["RANK"]))

    async def info(self, session: aiohttp.ClientSession, *, other_than: str = "") -> c.TrainerInfo:
        """When it answers, as an incarnation other than that one."""
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                async with session.get(f"{self.url}/v1/info") as answer:
                    found = c.TrainerInfo.model_validate_json(await answer.read())
                if found.incarnation != other_than:
                    return found
            except aiohttp.ClientError:
                pass
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()[-3000:]
            await asyncio.sleep(0.2)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def service(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    found = Service(base, folder / "store", folder / "log")
    yield found
    found.close()


async def checked_bytes(client: Client, rig: Rig) -> None:
    """Rows that came in as whole adapters go out with the same bytes, in segments of both ranks."""
    weights = {m: rig.random_weights(m, SPEC, seed=i) for i, m in enumerate(MEMBERS)}
    await reset(client, [start(m, SPEC, weights=weights[m]) for m in MEMBERS])
    await client.admit(1, "a", "b")
    await client.admit(2, "c")
    export = c.Export(header=client.header(3), members=MEMBERS, probes=PROBES)
    done = c.ExportDone.model_validate_json(await client.send("export", export))
    assert {m: done.weights[m].digest for m in MEMBERS} == {m: weights[m].digest for m in MEMBERS}
    assert len({r.path for r in done.weights.values()}) == 2
    assert all(np.isfinite(done.probe_logprobs[m]).all() and len(done.probe_logprobs[m]) == 2 for m in MEMBERS)
    save = c.SaveState(header=client.header(4), members=MEMBERS)
    states = c.SaveStateDone.model_validate_json(await client.send("save_state", save)).states
    whole, again = Rig(rig.model, rig.folder, slots=3), Rig(rig.model, rig.folder, slots=3)
    whole.reset([start(m, SPEC, state=states[m]) for m in MEMBERS])
    again.reset([start(m, SPEC, weights=weights[m]) for m in MEMBERS])
    assert all(same_rows(whole.row(m), again.row(m)) for m in MEMBERS)


async def reset(client: Client, starts: list[c.MemberStart], *, epoch: int = 1) -> None:
    command = c.Reset(run=client.run, epoch=epoch, namespace=NAMESPACE, population=POPULATION, members=tuple(starts))
    client.incarnation = c.ResetDone.model_validate_json(await client.send("reset", command)).incarnation
    client.epoch, client.seq = epoch, 0


async def checked_training(client: Client, rig: Rig) -> None:
    """Steps of members in waves, with rows that go to the store between them, are those of one process."""
    weights = {m: rig.random_weights(m, SPEC, seed=i) for i, m in enumerate(MEMBERS)}
    alone = Rig(rig.model, rig.folder, slots=3)
    alone.reset([start(m, SPEC, weights=weights[m]) for m in MEMBERS])
    await reset(client, [start(m, SPEC, weights=weights[m]) for m in MEMBERS], epoch=3)
    for step in range(2):
        found = examples(MEMBERS, each=3, vocab=96, seed=step)
        for wave in (("a", "b"), ("c",)):
            done = await client.step([e for e in found if e.member in wave], rate=1e-4)
            assert done.members.keys() == set(wave)
        alone.step(found, rate=1e-4)
    save = c.SaveState(header=client.header(client.seq + 1), members=MEMBERS)
    states = c.SaveStateDone.model_validate_json(await client.send("save_state", save)).states
    saved = Rig(rig.model, rig.folder, slots=3)
    saved.reset([start(m, SPEC, state=states[m]) for m in MEMBERS])
    for member in MEMBERS:
        one, other, begun = saved.row(member), alone.row(member), rig.store.read(weights[member])
        assert one.step == other.step == 2
        gap = (one.weights - other.weights).abs()
        # Adam divides a gradient by its own size: where it is almost zero, rounding decides an element's step.
        assert gap.quantile(0.99) < 1e-6 and gap.max() < 2.1e-4
        first = np.frombuffer(rig.shape(SPEC).unpack(begun), np.float32)
        assert np.abs(one.weights.numpy() - first).max() > 1e-5


async def checked_refusal(client: Client, rig: Rig) -> None:
    """Bytes that are wrong refuse the command on both ranks, which go on together."""
    good = rig.random_weights("a", SPEC, seed=1)
    bad = good.model_copy(update={"digest": "0" * 64})
    await reset(client, [start("a", SPEC, weights=bad), start("b", SPEC, weights=good)], epoch=2)
    with pytest.raises(DigestMismatch):
        await client.admit(1, "a")
    await client.admit(1, "b")


async def checked_runs_at_once(clients: Sequence[Client], rig: Rig) -> None:
    """Commands of many runs that arrive together reach both ranks, and each run gets its own."""
    weights = [rig.random_weights("m", SPEC, seed=i) for i, _ in enumerate(clients)]
    found = examples(["m"], each=2, vocab=96)
    async with asyncio.timeout(120):
        await asyncio.gather(
            *(reset(each, [start("m", SPEC, weights=w)]) for each, w in zip(clients, weights, strict=True))
        )
        for _ in range(2):
            await asyncio.gather(*(each.step(found, rate=1e-4) for each in clients))
        saves = [each.send("save_state", c.SaveState(header=each.header(7), members=("m",))) for each in clients]
        states = [c.SaveStateDone.model_validate_json(s).states["m"] for s in await asyncio.gather(*saves)]
    for begun, state in zip(weights, states, strict=True):
        alone, saved = Rig(rig.model, rig.folder), Rig(rig.model, rig.folder)
        alone.reset([start("m", SPEC, weights=begun)])
        for _ in range(2):
            alone.step(found, rate=1e-4)
        saved.reset([start("m", SPEC, state=state)])
        assert (saved.row("m").weights - alone.row("m").weights).abs().quantile(0.99) < 1e-6


async def checked_failure(service: Service, session: aiohttp.ClientSession, client: Client, rig: Rig) -> None:
    """An error that is no answer ends both ranks: nobody knows how far the other came."""
    before = await service.info(session)
    await reset(client, [start("a", SPEC, weights=rig.random_weights("a", SPEC, seed=1))], epoch=4)
    with pytest.raises(aiohttp.ClientError):
        await client.step(examples(["a"], each=2, vocab=96), rate=1e-30)  # too small to move any weight
    assert "NothingLearned: member a" in service.log.read_text()
    after = await service.info(session, other_than=before.incarnation)
    assert after.runs == {}


async def checked_loss_of_a_rank(service: Service, session: aiohttp.ClientSession, client: Client, rig: Rig) -> None:
    before = await service.info(session)
    service.ranks()[1].kill()
    after = await service.info(session, other_than=before.incarnation)
    assert len(service.ranks()) == 2 and after.runs == {}
    with pytest.raises(UnknownIncarnation):
        await client.admit(client.seq + 1, "b")
    await reset(client, [start("a", SPEC, weights=rig.random_weights("a", SPEC, seed=5))], epoch=5)
    assert client.incarnation == after.incarnation
    await client.admit(1, "a")


@pytest.mark.slow
async def test_two_ranks_serve_as_one_and_begin_anew_together(
    service: Service, model: BaseModel, tmp_path: pathlib.Path
) -> None:
    rig = Rig(model, service.log.parent / "store", slots=3)
    async with aiohttp.ClientSession() as session:
        await service.info(session)
        client = Client(rig, service.url, session)
        await checked_bytes(client, rig)
        await checked_refusal(client, rig)
        await checked_training(client, rig)
        await checked_runs_at_once([Client(rig, service.url, session, run=f"r{i}") for i in range(6)], rig)
        await checked_failure(service, session, client, rig)
        await checked_loss_of_a_rank(service, session, client, rig)
    ranks = service.ranks()
    service.process.send_signal(signal.SIGTERM)
    psutil.wait_procs(ranks, timeout=20)
    assert "the thread that executes commands ended" not in service.log.read_text().split(client.incarnation)[-1]
