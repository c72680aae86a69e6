"""Samples are the engine's own ids and logprobs under the right adapter, in the caller's order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from allele.format import export_peft
from allele.residency.space import pages
from tests.rollout.rollout_engine import EngineProcess
from tests.rollout.rollout_parts import (
    ALPHA,
    EOS,
    SHAPE,
    ProbeSequence,
    Sample,
    Service,
    StoredPopulation,
    call,
    random_adapter,
    reference,
)

PROMPT = (13, 4, 6, 3, 5, 2)
Start = Callable[..., Service]


def check(sample: Sample, packed: bytes | None) -> None:
    """The sample is one, and its logprobs are those of the adapter."""
    assert sample.error is None and 1 <= len(sample.completion) <= 8
    truth = reference(packed, [ProbeSequence(prompt=PROMPT, completion=tuple(sample.completion))])
    assert sample.logprobs == pytest.approx(truth, abs=1e-4)


def test_served_logprobs_equal_those_of_hugging_face(gateway: Start, population: StoredPopulation) -> None:
    adapters = {f"m{i}": random_adapter(i) for i in range(3)}
    population.commit(adapters)
    rows = [("m1", 1, PROMPT), ("m0", 1, PROMPT), ("base", None, PROMPT), ("m2", 1, PROMPT), ("m1", 1, PROMPT)]
    samples = gateway().generate(rows, n=2)
    assert [s.request for s in samples] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for sample in samples:
        assert (sample.finish == "stop") == (sample.completion[-1] == EOS)
        check(sample, adapters.get(rows[sample.request][0]))


def test_greedy_samples_equal_a_direct_call_of_the_engine(
    gateway: Start, population: StoredPopulation, engine: EngineProcess
) -> None:
    population.commit({"a": random_adapter(1)})
    service = gateway()
    (sample,) = service.generate([("a", 1, PROMPT)], temperature=0.0)
    names = [m["id"] for m in call(f"{engine.url}/v1/models").json["data"] if "styles/a@1" in m["id"]]
    sampling = {"temperature": 0.0, "max_new_tokens": 8, "stop_token_ids": [EOS]}
    direct = call(
        f"{engine.url}/generate",
        {"input_ids": list(PROMPT), "lora_path": names[0], "sampling_params": sampling, "return_logprob": True},
    ).json
    assert sample.completion == direct["output_ids"]
    assert sample.logprobs == pytest.approx([p for p, *_ in direct["meta_info"]["output_token_logprobs"]], abs=1e-6)


def test_an_exported_folder_loads_in_the_engine_without_a_gateway(engine: EngineProcess, tmp_path: Path) -> None:
    packed, greedy = random_adapter(5), {"temperature": 0.0, "max_new_tokens": 8, "stop_token_ids": [EOS]}
    export_peft(packed, tmp_path / "folder", shape=SHAPE, scale=ALPHA / SHAPE.rank, base_name="tiny")
    loaded = call(f"{engine.url}/load_lora_adapter", {"lora_name": "alone", "lora_path": str(tmp_path / "folder")})
    assert loaded.status == 200, loaded.body
    asked = {"input_ids": list(PROMPT), "lora_path": "alone", "sampling_params": greedy, "return_logprob": True}
    answer = call(f"{engine.url}/generate", asked).json
    assert call(f"{engine.url}/unload_lora_adapter", {"lora_name": "alone"}).status == 200
    logprobs = [p for p, *_ in answer["meta_info"]["output_token_logprobs"]]
    truth = reference(packed, [ProbeSequence(prompt=PROMPT, completion=tuple(answer["output_ids"]))])
    assert len(logprobs) >= 1 and logprobs == pytest.approx(truth, abs=1e-4)


def test_more_adapters_than_may_be_loaded_are_all_served_right(gateway: Start, population: StoredPopulation) -> None:
    adapters = {f"m{i}": random_adapter(100 + i) for i in range(11)}
    population.commit(adapters)
    service = gateway(host_bytes=5 * pages(SHAPE.packed_bytes))
    for _ in range(2):
        rows = [(f"m{i % 11}", 1, PROMPT) for i in range(22)]
        for sample, (member, _, _) in zip(service.generate(rows), rows, strict=True):
            check(sample, adapters[member])
    tiers = {t["name"]: t["adapters"] for t in call(f"{service.internal}/v1/status").json["tiers"]}
    assert tiers["host"] == 5 and tiers["disk"] == 11


def test_a_bad_row_fails_alone(gateway: Start, population: StoredPopulation) -> None:
    population.commit({"a": random_adapter(1)})
    good = ("a", 1, PROMPT)
    rows = [good, ("a", 7, PROMPT), ("nobody", 1, PROMPT), ("a", 1, ()), ("a", 1, (3, 4, 9999)), good]
    errors = [s.error for s in gateway().generate(rows)]
    assert errors[0] is None and errors[5] is None
    assert "no revision 7, the newest is 1" in str(errors[1])
    assert "no such member" in str(errors[2])
    assert "at least one token" in str(errors[3])
    assert "found 9999" in str(errors[4])


def test_a_revision_is_found_as_soon_as_its_catalogue_version_is_named(
    gateway: Start, population: StoredPopulation
) -> None:
    first, second = random_adapter(1), random_adapter(2)
    population.commit({"a": first})
    service = gateway(tail_seconds=3600.0)
    assert service.generate([("a", 1, PROMPT)])[0].error is None
    version = population.commit({"a": second}, revision=2, parent=1)
    assert "no revision 2" in str(service.generate([("a", 2, PROMPT)])[0].error)
    (sample,) = service.generate([("a", 2, PROMPT)], version=version)
    check(sample, second)
    (old,) = service.generate([("a", 1, PROMPT)])
    check(old, first)


def test_a_population_of_another_base_is_refused(gateway: Start, tmp_path: Path) -> None:
    other = StoredPopulation(f"file://{tmp_path}/store", namespace="team", name="foreign", base_digest="sha256:other")
    other.commit({"a": random_adapter(1)}, expose=True)
    answer = gateway().complete("foreign/a")
    assert answer.status == 400 and "expected sha256:bbb" in answer.json["error"]["message"]
