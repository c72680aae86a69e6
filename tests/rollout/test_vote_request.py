"""A vote asks real members, counts what they say, and answers with the winner's own reply."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.rollout.rollout_engine import EngineProcess
from tests.rollout.rollout_parts import Answer, Service, StoredPopulation, call, random_adapter

Start = Callable[..., Service]
PROMPT = "kbdac="


def vote(service: Service, *members: str, model: str = "styles", **fields: Any) -> Answer:
    return service.complete(model, prompt=PROMPT, vote={"members": list(members), "rule": "majority"}, **fields)


@pytest.fixture
def service(gateway: Start, population: StoredPopulation) -> Service:
    """`a` and `twin` are the same adapter, `b` another one."""
    population.commit({"a": random_adapter(1), "twin": random_adapter(1), "b": random_adapter(2)}, expose=True)
    population.commit({"b": random_adapter(1)}, revision=2, parent=1)
    return gateway()


def test_the_majority_answers_in_its_own_words(service: Service) -> None:
    alone = {m: service.complete(f"styles/{m}").json["choices"][0]["text"] for m in ("a", "b")}
    assert alone["a"] != alone["b"]
    answer = vote(service, "styles/b", "styles/a", "styles/twin")
    assert answer.status == 200, answer.body
    reply = answer.json
    assert reply["object"] == "text_completion" and reply["model"] == "styles"
    assert reply["choices"][0]["text"] == alone["a"] and reply["choices"][0]["logprobs"] is None
    count = reply["allele"]["vote"]
    assert count["winner"] in ("styles/a", "styles/twin") and count["failed"] == {}
    assert count["split"] == [
        {"text": alone["a"], "votes": 2, "members": ["styles/a", "styles/twin"]},
        {"text": alone["b"], "votes": 1, "members": ["styles/b"]},
    ]
    assert count["revisions"] == {"styles/a": 1, "styles/b": 1, "styles/twin": 1}
    assert answer.headers["x-allele-revision"] == "1"


def test_a_tie_goes_to_the_member_that_is_surer(service: Service) -> None:
    def mean(member: str) -> float:
        logprobs = service.complete(member, logprobs=0).json["choices"][0]["logprobs"]["token_logprobs"]
        return float(sum(logprobs) / len(logprobs))

    surer = max(("styles/a", "styles/b"), key=mean)
    for members in (("styles/a", "styles/b"), ("styles/b", "styles/a")):
        assert vote(service, *members, model=members[0]).json["allele"]["vote"]["winner"] == surer


def test_openais_client_holds_a_vote_over_revisions_in_a_chat(service: Service) -> None:
    client = openai.OpenAI(base_url=f"{service.tenant}/v1", api_key="none", max_retries=0)
    raw = client.chat.completions.with_raw_response.create(
        model="styles/b",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=8,
        temperature=0,
        logprobs=True,
        extra_body={"vote": {"members": ["styles/b", "styles/b@2", "styles/a"]}},
    )
    answer = raw.parse()
    assert answer.model == "styles/b" and answer.choices[0].logprobs is not None
    count = answer.to_dict()["allele"]["vote"]  # type: ignore[index]
    assert count["split"][0]["members"] == ["styles/b@2", "styles/a"]
    assert raw.headers["x-allele-revision"] == str(count["revisions"][count["winner"]])


def test_a_member_that_fails_is_left_out_and_named(service: Service) -> None:
    answer = vote(service, "styles/a", "styles/nobody", "styles/a@9")
    assert answer.status == 200 and answer.json["allele"]["vote"]["winner"] == "styles/a"
    failed = answer.json["allele"]["vote"]["failed"]
    assert "no such member" in failed["styles/nobody"] and "no revision 9" in failed["styles/a@9"]


def test_a_vote_fails_when_all_members_do(service: Service) -> None:
    answer = vote(service, "styles/nobody", "styles/noone")
    assert answer.status == 404 and "all 2 members failed" in answer.json["error"]["message"]


def test_a_vote_cannot_name_an_adapter_behind_the_gateways_back(service: Service, engine: EngineProcess) -> None:
    """The engine takes what follows the colon of a `model` for an adapter."""
    alone = {m: service.complete(f"styles/{m}").json["choices"][0]["text"] for m in ("a", "b")}
    (loaded,) = (m["id"] for m in call(f"{engine.url}/v1/models").json["data"] if "styles/b@1" in m["id"])
    answer = vote(service, "styles/a", f"tiny:{loaded}", model=f"tiny:{loaded}")
    assert answer.status == 200 and answer.json["choices"][0]["text"] == alone["a"] != alone["b"]
    assert list(answer.json["allele"]["vote"]["failed"]) == [f"tiny:{loaded}"]


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("stream", {"stream": True}),
        ("n", {"n": 2}),
        ("n", {"prompt": ["a=", "b="]}),
        ("model", {"model": "other"}),
        ("model", {"model": "styles/c"}),
        ("vote", {"vote": {"members": ["styles/a"]}}),
        ("vote", {"vote": {"members": ["styles/a"] * 2}}),
        ("vote", {"vote": {"members": [f"styles/m{i}" for i in range(65)]}}),
        ("vote", {"vote": {"members": ["styles/a", "styles/b"], "rule": "best"}}),
        ("vote", {"vote": {"members": ["styles/a", "styles/b"], "quorum": 2}}),
    ],
)
def test_what_a_vote_cannot_be_about_is_a_bad_request(service: Service, param: str, fields: dict[str, Any]) -> None:
    body = {"model": "styles", "prompt": PROMPT, "vote": {"members": ["styles/a", "styles/b"]}, **fields}
    answer = call(f"{service.tenant}/v1/completions", body)
    assert answer.status == 400 and answer.json["error"]["param"] == param, answer.body


def test_a_vote_without_a_place_for_each_member_is_refused_whole(gateway: Start, population: StoredPopulation) -> None:
    population.commit({f"m{i}": random_adapter(i) for i in range(4)}, expose=True)
    service = gateway(running=1, requests=3)
    members = [f"styles/m{i}" for i in range(4)]
    refused = vote(service, *members)
    assert refused.status == 429 and int(refused.headers["Retry-After"]) >= 1
    fits = vote(service, *members[:3])  # one runs, two wait
    assert fits.status == 200 and not fits.json["allele"]["vote"]["failed"]
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(vote(service, *members[:2]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers:  # all members or none
        assert answer.status == 429 or not answer.json["allele"]["vote"]["failed"]
    assert 200 in {a.status for a in answers}
    assert service.complete("styles/m0").status == 200  # every place was given back
