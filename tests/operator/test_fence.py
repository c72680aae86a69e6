"""No write leaves a process that may no longer lead; every request ends in time; leases are taken when they ran out."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from aiohttp import web
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from allele_operator.cluster.errors import ApiError, FenceShut
from allele_operator.cluster.kinds import Obj
from allele_operator.cluster.kube import Kube
from allele_operator.cluster.lease import Lease, Times
from allele_operator.cluster.transport import Transport


class Server:
    """An API server that remembers what reached it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.seen.append(f"{request.method} {request.path}")
        if request.path.endswith("/slow"):
            await asyncio.sleep(30)
        if request.path.endswith("/busy"):
            return web.json_response({"reason": "TooManyRequests"}, status=429, headers={"Retry-After": "7"})
        return web.json_response({"metadata": {"name": "x"}, "status": {"authenticated": True}})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", found.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


@pytest.fixture
async def api(server: Server) -> AsyncIterator[ApiClient]:
    client = ApiClient(Configuration(host=server.url))
    yield client
    await client.close()


async def test_behind_a_shut_fence_nothing_is_written_and_questions_still_go_out(
    server: Server, api: ApiClient
) -> None:
    open_ = True
    kube = Kube(Transport(api, timeout=5, fence=lambda: open_))
    job = {"kind": "Job", "metadata": {"namespace": "team", "name": "x"}}
    await kube.create(job)
    open_ = False
    before = len(server.seen)
    for write in (
        kube.create(job),
        kube.apply(job),
        kube.patch("Job", namespace="team", name="x", body={}),
        kube.status("Job", namespace="team", name="x", version="1", patch={}),
        kube.delete("Job", namespace="team", name="x", uid="u"),
        kube.replace(job),
    ):
        with pytest.raises(FenceShut):
            await write
    assert len(server.seen) == before
    await kube.get("Job", namespace="team", name="x")
    await kube.review_token("token", "audience")
    assert len(server.seen) == before + 2


async def test_a_server_that_hangs_or_is_gone_is_an_error_in_time(server: Server, api: ApiClient) -> None:
    kube = Kube(Transport(api, timeout=0.2, fence=lambda: True))
    async with asyncio.timeout(5):
        with pytest.raises(ApiError) as hung:
            await kube.get("Job", namespace="team", name="slow")
    assert hung.value.status == 0
    lost = ApiClient(Configuration(host="http://127.0.0.1:1"))
    with pytest.raises(ApiError) as gone:
        await Kube(Transport(lost, timeout=1, fence=lambda: True)).get("Job", namespace="team", name="x")
    assert gone.value.status == 0
    await lost.close()


async def test_the_servers_wish_to_wait_is_carried(api: ApiClient) -> None:
    with pytest.raises(ApiError) as e:
        await Kube(Transport(api, timeout=5, fence=lambda: True)).get("Job", namespace="team", name="busy")
    assert (e.value.status, e.value.retry_after) == (429, 7)


class Leases:
    """The verbs that an election uses, over one object with the API server's conflicts."""

    def __init__(self) -> None:
        self.lease: Obj | None = None

    async def get(self, *_: Any, **__: Any) -> Obj | None:
        return copy.deepcopy(self.lease)

    async def create(self, body: Obj) -> Obj | None:
        if self.lease is not None:
            return None
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = "1"
        return self.lease

    async def replace(self, body: Obj) -> Obj:
        assert self.lease is not None
        version = self.lease["metadata"]["resourceVersion"]
        if body["metadata"]["resourceVersion"] != version:
            raise ApiError(409, "Conflict", "changed")
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(int(version) + 1)
        return self.lease


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def candidate(leases: Leases, clock: Clock, name: str, *, duration: float = 15) -> Lease:
    times = Times(duration=duration, renew_deadline=10, retry=0)
    return Lease(cast(Kube, leases), namespace="n", name="l", identity=name, times=times, clock=clock)


async def attempt(lease: Lease) -> bool:
    """One try to take the lease."""
    try:
        await asyncio.wait_for(lease.acquire(), 0.02)
    except TimeoutError:
        return False
    return True


async def test_the_fence_shuts_before_another_may_lead() -> None:
    leases, clock = Leases(), Clock()
    first, second = candidate(leases, clock, "first"), candidate(leases, clock, "second")
    assert not first.valid()
    assert await attempt(first) and first.valid()
    assert not await attempt(second) and second.holder == "first"
    clock.now += 9.9
    assert first.valid()
    clock.now += 0.2
    assert not first.valid() and not await attempt(second)
    clock.now += 5
    assert await attempt(second) and second.valid() and not first.valid()


async def test_the_holders_duration_counts_not_the_candidates() -> None:
    leases, clock = Leases(), Clock()
    assert await attempt(candidate(leases, clock, "patient", duration=3600))
    hasty = candidate(leases, clock, "hasty", duration=15)
    assert not await attempt(hasty)
    clock.now += 3599
    assert not await attempt(hasty)
    clock.now += 2
    assert await attempt(hasty)


async def test_a_released_lease_is_free_at_once_and_only_its_holder_can_release_it() -> None:
    leases, clock = Leases(), Clock()
    first, second = candidate(leases, clock, "first"), candidate(leases, clock, "second")
    assert await attempt(first)
    await second.release()
    assert leases.lease is not None and leases.lease["spec"]["holderIdentity"] == "first"
    await first.release()
    assert not first.valid()
    assert await attempt(second)
    clock.now += 16
    third = candidate(leases, clock, "third")
    assert not await attempt(third)
    clock.now += 16
    assert await attempt(third)
    await second.release()  # it led, and does not know yet that it lost
    assert leases.lease["spec"]["holderIdentity"] == "third"
