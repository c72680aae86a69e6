"""Members keep to their replica, lost replicas are passed over, and all replicas must agree before exposure."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from allele.api.run import Sampling
from allele.protocol.errors import Unavailable
from allele.protocol.samples import COMPLETIONS, PROMPTS, Generate, Generated, decode, encode
from allele.protocol.serving import Gate, Prefetch, Prefetched, ProbeReply, ProbeRequest, ProbeResult, Target
from allele_driver import sampling
from allele_driver.exposure import combined
from allele_driver.metrics import PREFETCH_FAILURES
from allele_driver.patience import Patience, Stopping
from allele_driver.rollouts import Drawn
from allele_driver.sampling import Ask, Gateways, replica_of, resolve
from tests.driver.driver_parts import free_port

MEMBERS = [f"m-{i}" for i in range(40)]


class Replica:
    """Speaks a gateway's protocol; its samples say which replica gave them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.url = f"http://127.0.0.1:{free_port()}"
        self.asked: list[str] = []
        self.failing = 0
        self.bad_samples = 0
        self.verdict = "Passed"
        self.announced: list[Prefetch] = []
        self.refuses = False
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/generate", self._generate)
        app.router.add_post("/v1/probe", self._probe)
        app.router.add_post("/v1/prefetch", self._prefetch)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", int(self.url.rsplit(":", 1)[1])).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _generate(self, request: web.Request) -> web.Response:
        if self.failing:
            self.failing -= 1
            return web.json_response({"code": "Unavailable", "message": "engine starting"}, status=503)
        header, table = decode(await request.read(), Generate, PROMPTS)
        self.asked += table["member"].to_pylist()
        rows = [i for i in range(table.num_rows) for _ in range(header.n)]
        errors: list[object] = [None] * len(rows)
        if self.bad_samples:
            self.bad_samples -= 1
            errors[0] = "aborted"
        columns: dict[str, list[object]] = {
            "request": list(rows),
            "completion": [[self.number]] * len(rows),
            "logprobs": [[-1.0]] * len(rows),
            "finish": ["stop"] * len(rows),
            "error": errors,
        }
        return web.Response(body=encode(Generated(seconds=0), COMPLETIONS, columns))

    async def _probe(self, request: web.Request) -> web.Response:
        body = ProbeRequest.model_validate_json(await request.read())
        results = tuple(
            ProbeResult.model_validate(
                {"member": t.member, "revision": t.revision, "verdict": self.verdict, "max_gap": self.number * 1e-6}
            )
            for t in body.targets
        )
        return web.Response(body=ProbeReply(results=results, seconds=0).model_dump_json())

    async def _prefetch(self, request: web.Request) -> web.Response:
        if self.refuses:
            return web.json_response({"code": "Overloaded", "message": "full"}, status=429)
        self.announced.append(Prefetch.model_validate_json(await request.read()))
        return web.Response(body=Prefetched(taken=0).model_dump_json())


@pytest_asyncio.fixture
async def replicas() -> AsyncIterator[list[Replica]]:
    made = [Replica(i) for i in range(1, 4)]
    for r in made:
        await r.start()
    yield made
    for r in made:
        await r.stop()


@pytest_asyncio.fixture
async def gateways(replicas: list[Replica]) -> AsyncIterator[Gateways]:
    """All replicas behind one name."""

    async def addresses(_: str) -> list[str]:
        return [r.url for r in replicas]

    async with aiohttp.ClientSession() as session:
        patience = Patience(stopping=asyncio.Event(), rng=random.Random(0), first=0.01, most=0.05)
        yield Gateways(
            ["http://pool"], session=session, namespace="n", population="p", patience=patience, resolve=addresses
        )


async def ask(gateways: Gateways, *, n: int = 1) -> list[list[Drawn | str]]:
    asks = [Ask(m, 1, (1, 2)) for m in MEMBERS]
    return await gateways.generate(asks, n=n, sampling=Sampling(), stop=(1,), version=3)


async def test_each_member_has_its_replica_and_answers_keep_their_order(
    gateways: Gateways, replicas: list[Replica]
) -> None:
    found = await ask(gateways, n=2)
    urls = [r.url for r in replicas]
    expected = [urls.index(replica_of(m, urls)) + 1 for m in MEMBERS]
    assert [[d.ids for d in f if isinstance(d, Drawn)] for f in found] == [[(e,), (e,)] for e in expected]
    assert all(len(r.asked) > 4 for r in replicas)


async def test_only_members_of_a_lost_replica_move(gateways: Gateways, replicas: list[Replica]) -> None:
    before = await ask(gateways)
    await replicas[1].stop()
    after = await ask(gateways)
    for b, a in zip(before, after, strict=True):
        (was,), (now,) = b, a
        assert isinstance(was, Drawn) and isinstance(now, Drawn)
        assert now.ids != (2,)
        assert was.ids == now.ids or was.ids == (2,)


async def test_an_outage_of_all_replicas_is_waited_out(gateways: Gateways, replicas: list[Replica]) -> None:
    for r in replicas:
        r.failing = 3
    found = await ask(gateways)
    assert all(isinstance(d, Drawn) for (d,) in found)


async def test_a_failed_sample_is_asked_for_again_and_then_given_up(
    gateways: Gateways, replicas: list[Replica]
) -> None:
    replicas[0].bad_samples = 1
    assert all(isinstance(d, Drawn) for (d,) in await ask(gateways))
    replicas[0].bad_samples = 100
    texts = [d for (d,) in await ask(gateways) if isinstance(d, str)]
    assert texts == ["aborted"]


async def test_one_replica_that_disagrees_is_enough(gateways: Gateways, replicas: list[Replica]) -> None:
    targets = [Target(member=m, revision=2) for m in MEMBERS[:2]]
    verdicts = combined(await gateways.probe(targets, gate=Gate(), version=1))
    assert [v.passed for v in verdicts] == [True, True]
    assert verdicts[0].max_gap == pytest.approx(3e-6)
    replicas[2].verdict = "Gap"
    verdicts = combined(await gateways.probe(targets, gate=Gate(), version=1))
    assert [(v.refusal, v.outage) for v in verdicts] == [("Gap", False)] * 2
    assert replicas[2].url in verdicts[0].message


async def test_a_silent_replica_has_not_passed(
    gateways: Gateways, replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "PROBE_SECONDS", 0.3)
    await replicas[0].stop()
    (verdict,) = combined(await gateways.probe([Target(member="m", revision=2)], gate=Gate(), version=1))
    assert verdict.refusal == "LoadFailed" and verdict.outage, "the revision is not to blame"
    assert replicas[0].url in verdict.message


def test_a_target_that_a_replica_leaves_out_has_not_passed() -> None:
    passed = ProbeResult(member="m", revision=2, verdict="Passed", max_gap=1e-6)
    (verdict,) = combined({"a": [passed], "b": []})
    assert not verdict.passed and verdict.outage


def test_what_a_replica_found_out_is_told_before_the_silence_of_another() -> None:
    silent = ProbeResult(member="m", revision=2, verdict="LoadFailed", message="no answer", outage=True)
    gap = ProbeResult(member="m", revision=2, verdict="Gap", max_gap=0.3, mean_gap=0.1, move=0.2, message="too far")
    (verdict,) = combined({"a": [silent], "b": [gap], "c": []})
    assert (verdict.refusal, verdict.outage, verdict.mean_gap, verdict.move) == ("Gap", False, 0.1, 0.2)


async def test_each_replica_is_told_of_its_members_and_a_refusal_is_only_counted(
    gateways: Gateways, replicas: list[Replica]
) -> None:
    urls = [r.url for r in replicas]
    targets = [Target(member=m, revision=2) for m in MEMBERS]
    await gateways.prefetch(targets, run="uid", version=3, seconds=90)
    for r in replicas:
        (told,) = r.announced
        assert [t.member for t in told.targets] == [m for m in MEMBERS if replica_of(m, urls) == r.url]
        assert (told.run, told.version, told.seconds) == ("uid", 3, 90)
    replicas[0].refuses = True
    await replicas[1].stop()
    failures = PREFETCH_FAILURES._value.get()
    await gateways.prefetch([], run="uid", version=3, seconds=90)
    assert PREFETCH_FAILURES._value.get() == failures + 2
    assert [t.targets for t in replicas[2].announced[1:]] == [()]


async def test_a_name_resolves_to_one_url_for_each_address() -> None:
    assert await resolve("http://localhost:8001") == ["http://127.0.0.1:8001"]
    with pytest.raises(OSError):
        await resolve("http://no-such-host.invalid:8001")


async def test_a_stop_ends_a_wait() -> None:
    stopping, waits = asyncio.Event(), list[str]()
    patience = Patience(stopping=stopping, rng=random.Random(0), on_wait=waits.append, first=0.01, most=0.02)

    async def never() -> None:
        if len(waits) > 3:
            stopping.set()
        raise Unavailable("not yet")

    with pytest.raises(Stopping, match="waiting for the pool: not yet"):
        await patience.until("the pool", never)
    assert "waiting for the pool: Unavailable: not yet" in waits[0]
