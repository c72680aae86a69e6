"""What nobody waits for any more leaves the engine and gives its place back."""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
from collections.abc import Callable
from pathlib import Path

import aiohttp
import openai
import pytest

from tests.rollout import rollout_moe
from tests.rollout.rollout_engine import EngineProcess
from tests.rollout.rollout_parts import Sample, Service, StoredPopulation, call, random_adapter

PROMPT = (13, 4, 6, 3, 5, 2)
ENDLESS = rollout_moe.CONTEXT - 100
"""Tokens: more than a minute, even where a token takes five milliseconds."""
SECONDS = 20.0
Start = Callable[..., Service]


@pytest.fixture
def start(gateway: Start, moe_engine: EngineProcess, tmp_path: Path) -> Start:
    shape = rollout_moe.shape_of(moe_engine.base)
    population = StoredPopulation(f"file://{tmp_path}/store", namespace="team", name="styles", shape=shape)
    population.commit({"a": random_adapter(1, shape=shape)}, expose=True)
    return lambda **changes: gateway(engine=moe_engine.url, base_name="moe", **changes)


def test_a_closed_stream_is_aborted_and_its_place_is_free(start: Start, moe_engine: EngineProcess) -> None:
    client = openai.OpenAI(base_url=f"{start(requests=1).tenant}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model="styles/a", prompt="kbdac=", max_tokens=ENDLESS, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    moe_engine.until_running(lambda n: n == 1)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="styles/a", prompt="kbdac=", max_tokens=2)
    stream.close()
    moe_engine.until_running(lambda n: n == 0, seconds=SECONDS)
    assert client.completions.create(model="styles/a", prompt="kbdac=", max_tokens=2).choices[0].finish_reason


async def test_an_answer_that_nobody_waits_for_is_aborted(start: Start, moe_engine: EngineProcess) -> None:
    service = await asyncio.to_thread(start)
    body = {"model": "styles/a", "prompt": "kbdac=", "max_tokens": ENDLESS, "ignore_eos": True}
    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(session.post(f"{service.tenant}/v1/completions", json=body))
        await asyncio.to_thread(moe_engine.until_running, lambda n: n == 1)
        asking.cancel()
        await asyncio.to_thread(moe_engine.until_running, lambda n: n == 0, seconds=SECONDS)


def test_the_tools_of_a_chat_reach_the_template(start: Start) -> None:
    client = openai.OpenAI(base_url=f"{start().tenant}/v1", api_key="none", max_retries=0)
    request = {"model": "styles/a", "messages": [{"role": "user", "content": "kbdac="}], "max_tokens": 2}
    tool = {"type": "function", "function": {"name": "abcd", "parameters": {"type": "object"}}}
    plain, with_tools = (
        client.chat.completions.create(**request, **more)  # type: ignore[call-overload]
        for more in ({}, {"tools": [tool]})
    )
    assert with_tools.usage.prompt_tokens == plain.usage.prompt_tokens + 4


def endless(service: Service, prefix: str, *, tokens: int = ENDLESS) -> list[Sample]:
    return service.generate(
        [("a", 1, PROMPT)], n=4, max_tokens=tokens, stop_token_ids=(), temperature=1.0, request_prefix=prefix
    )


def until_queued(service: Service, number: int) -> None:
    """All of them are in the gateway."""
    for _ in range(10_000):
        text = call(f"{service.internal}/metrics").body.decode()
        found = re.search(r'allele_gateway_queue_requests\{port="internal"\} (\S+)', text)
        assert found is not None
        if float(found[1]) == number:
            return
    pytest.fail(f"expected {number} batches in the gateway, found {found[1]}")


def test_an_abort_ends_what_runs_and_drops_what_waits_below_its_prefix_only(
    start: Start, moe_engine: EngineProcess
) -> None:
    service = start(running=1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(endless, service, "run/u1/")
        moe_engine.until_running(lambda n: n > 0)
        waiting = pool.submit(endless, service, "run/u1/step/2/")
        other = pool.submit(endless, service, "run/u10/", tokens=8)
        until_queued(service, 3)
        answer = call(f"{service.internal}/v1/abort", {"prefix": "run/u1/"})
        assert answer.status == 200 and answer.json == {"batches": 2}
        for given_up in (running, waiting):
            samples = given_up.result(60)
            assert [s.request for s in samples] == [0] * 4
            assert all(s.finish == "abort" and s.completion == [] and "Aborted" in str(s.error) for s in samples)
        assert all(s.error is None and len(s.completion) >= 1 and s.revision == 1 for s in other.result(60))
    moe_engine.until_running(lambda n: n == 0, seconds=SECONDS)
    assert call(f"{service.internal}/v1/abort", {"prefix": "run/u1/"}).json == {"batches": 0}


@pytest.mark.parametrize("prefix", ["", "run/u1", "/", "run//", "a b/", "*"])
def test_a_prefix_that_could_reach_others_is_refused(start: Start, prefix: str) -> None:
    answer = call(f"{start().internal}/v1/abort", {"prefix": prefix})
    assert answer.status == 422 and "prefix" in answer.json["message"]


def test_the_engine_aborts_all_requests_below_a_prefix(moe_engine: EngineProcess) -> None:
    """Its own /abort_request would look for a request of just that name."""
    sampling = {"max_new_tokens": ENDLESS, "ignore_eos": True}
    body = {"input_ids": [list(PROMPT)] * 2, "sampling_params": sampling, "rid": ["run/x/1", "run/x/2"]}
    short = {"input_ids": list(PROMPT), "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}, "rid": "run/xy"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        long = pool.submit(call, f"{moe_engine.url}/generate", body)
        other = pool.submit(call, f"{moe_engine.url}/generate", short)
        moe_engine.until_running(lambda n: n == 3)
        assert call(f"{moe_engine.url}/abort_request", {"rid": "run/x/"}).status == 200
        reasons = [one["meta_info"]["finish_reason"]["type"] for one in long.result(60).json]
        assert reasons == ["abort", "abort"]
        assert other.result(60).json["meta_info"]["finish_reason"]["type"] == "length"
