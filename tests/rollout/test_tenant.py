"""Tenants reach exposed revisions by name, over the OpenAI API, and are told what is wrong with a name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from allele.store.facts import Fact
from tests.rollout.rollout_parts import Service, StoredPopulation, call, random_adapter

Start = Callable[..., Service]


def text(service: Service, model: str) -> str:
    answer = service.complete(model)
    assert answer.status == 200, answer.body
    assert answer.json["model"] == model
    return str(answer.json["choices"][0]["text"])


def test_a_bare_name_means_the_exposed_revision(gateway: Start, population: StoredPopulation) -> None:
    population.commit({"a": random_adapter(1)}, expose=True)
    population.commit({"a": random_adapter(2)}, revision=2, parent=1)
    service = gateway()
    first, second = text(service, "styles/a@1"), text(service, "styles/a@2")
    assert first != second
    assert text(service, "styles/a") == first
    version = population.add([Fact(kind="Exposed", member="a", revision=2)])
    service.generate([("a", 2, (3, 2))], version=version)
    assert text(service, "styles/a") == second
    assert text(service, "team/styles/a") == second
    population.add([Fact(kind="Held", member="a", revision=1, reason="rollback")])
    deadline = 50
    while text(service, "styles/a") != first and deadline:
        deadline -= 1
    assert deadline, "the hold was not seen"


def test_what_is_not_there_is_named(gateway: Start, population: StoredPopulation) -> None:
    population.commit({"a": random_adapter(1)})
    service = gateway()
    for model, status, words in (
        ("styles/a", 409, "no revision is exposed"),
        ("styles/a@9", 404, "no revision 9"),
        ("styles/nobody", 404, "no such member"),
        ("nothing/a", 404, "no such population"),
        ("other/styles/a", 404, "serves namespace team"),
        ("gpt-4", 404, "tiny for the base"),
    ):
        answer = service.complete(model)
        assert answer.status == status, (model, answer.body)
        error = answer.json["error"]
        assert words in error["message"] and error["param"] == "model"
        assert error["code"] == ("model_not_found" if status == 404 else "NotExposed")


def test_models_are_the_base_and_exposed_members_by_page(gateway: Start, population: StoredPopulation) -> None:
    population.commit({"a": random_adapter(1), "b": random_adapter(2)}, expose=True)
    population.commit({"hidden": random_adapter(3)})
    service = gateway()
    page = call(f"{service.tenant}/v1/models?limit=2").json
    assert [m["id"] for m in page["data"]] == ["styles/a", "styles/b"] and page["has_more"]
    rest = call(f"{service.tenant}/v1/models?limit=2&after={page['last_id']}").json
    assert [m["id"] for m in rest["data"]] == ["tiny"] and not rest["has_more"]


def test_a_tenant_cannot_name_an_adapter_behind_the_gateways_back(gateway: Start, population: StoredPopulation) -> None:
    population.commit({"a": random_adapter(1)})
    service = gateway()
    base = text(service, "tiny")
    assert text(service, "styles/a@1") != base
    names = [f"team/styles/a@1#{i}" for i in range(2)]
    for name in [*names, "styles/a@1"]:
        answer = service.complete("tiny", lora_path=name)
        assert answer.status == 200 and answer.json["choices"][0]["text"] == base


def test_chat_streams_with_the_openai_client_and_equals_the_whole_answer(
    gateway: Start, population: StoredPopulation
) -> None:
    openai = pytest.importorskip("openai")
    population.commit({"a": random_adapter(1)}, expose=True)
    service = gateway()
    client = openai.OpenAI(base_url=f"{service.tenant}/v1", api_key="none", max_retries=0)
    request = {
        "model": "styles/a",
        "messages": [{"role": "user", "content": "kbdac="}],
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert len(chunks) > 3 and {c.model for c in chunks} == {"styles/a"}
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert whole.choices[0].message.content == text(service, "styles/a")
    with pytest.raises(openai.NotFoundError, match="no such member"):
        client.chat.completions.create(**{**request, "model": "styles/nobody"})


def test_requests_that_fail_or_branch_do_not_keep_their_adapter_loaded(
    gateway: Start, population: StoredPopulation
) -> None:
    """SGLang loses count of both, and an unload would then block every load for ever."""
    members = {f"m{i}": random_adapter(i) for i in range(9)}
    population.commit(members, expose=True)
    service = gateway(loaded=4, deadline=60.0)
    assert service.complete("styles/m0", prompt="a" * 70).status == 400
    assert service.complete("styles/m0", prompt=[3, 4, 500]).status == 400
    assert len(service.complete("styles/m1", n=2, temperature=1).json["choices"]) == 2
    for prompt in ("ab=", ["ab=", "ba="]):
        assert service.complete("styles/m2", prompt=prompt, n=2, temperature=1, stream=True).status == 200
    for member in members:
        assert service.complete(f"styles/{member}").status == 200


def test_damaged_bytes_are_refused_and_the_revision_before_is_served(
    gateway: Start, population: StoredPopulation, tmp_path: Path
) -> None:
    population.commit({"a": random_adapter(1)}, expose=True)
    before = set((tmp_path / "store/team/styles/segments").iterdir())
    population.commit({"a": random_adapter(2), "b": random_adapter(3)}, revision=2, parent=1, expose=True)
    (segment,) = set((tmp_path / "store/team/styles/segments").iterdir()) - before
    data = bytearray(segment.read_bytes())
    data[5000] ^= 1
    segment.write_bytes(data)
    service = gateway()
    assert text(service, "styles/a") == text(service, "styles/a@1")
    refused = service.complete("styles/a@2")
    assert refused.status == 502 and refused.json["error"]["code"] == "DigestMismatch"
    assert "team/styles/a@2" in refused.json["error"]["message"]
    assert service.complete("styles/b").status == 200
    (sample,) = service.generate([("a", 2, (3, 2))])
    assert "DigestMismatch" in str(sample.error)


def test_a_full_queue_answers_429_and_a_freed_one_serves(gateway: Start, population: StoredPopulation) -> None:
    population.commit({"a": random_adapter(1)}, expose=True)
    service = gateway(running=1, requests=2)
    text(service, "styles/a")
    answers = []
    request = {"ignore_eos": True, "max_tokens": 40, "temperature": 1}
    threads = [
        threading.Thread(target=lambda: answers.append(service.complete("styles/a", **request))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(a.status for a in answers)
    assert statuses[0] == 200 and statuses[-1] == 429 and set(statuses) == {200, 429}
    refused = next(a for a in answers if a.status == 429)
    assert int(refused.headers["Retry-After"]) >= 1 and refused.json["error"]["type"] == "rate_limit_error"
    assert service.complete("styles/a").status == 200
    assert "allele_gateway_requests_total" in call(f"{service.internal}/metrics").body.decode()
