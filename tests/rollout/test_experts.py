"""Samples of a base with experts say which ones each token took, as the trainer replays them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from allele.protocol.errors import InvalidRequest
from allele.protocol.samples import PROMPTS, Generate, encode
from allele_rollout.gateway.generate import routed
from tests.rollout import rollout_moe
from tests.rollout.rollout_engine import EngineProcess
from tests.rollout.rollout_parts import Service, StoredPopulation, call, random_adapter

PROMPT = (13, 4, 6, 3, 5, 2)
Start = Callable[..., Service]


def test_experts_are_those_of_hugging_faces_routers(gateway: Start, moe_engine: EngineProcess, tmp_path: Path) -> None:
    shape = rollout_moe.shape_of(moe_engine.base)
    population = StoredPopulation(f"file://{tmp_path}/store", namespace="team", name="styles", shape=shape)
    adapters = {m: random_adapter(i, shape=shape) for i, m in enumerate(("a", "b"))}
    population.commit(adapters)
    service = gateway(engine=moe_engine.url, base_name="moe")
    samples = service.generate([("a", 1, PROMPT), ("base", None, PROMPT), ("b", 1, PROMPT)], n=2, experts=True)
    seen = set()
    for sample, member in zip(samples, ("a", "a", None, None, "b", "b"), strict=True):
        assert sample.error is None and sample.experts is not None
        tokens = [*PROMPT, *sample.completion]
        found = np.array(sample.experts).reshape(len(tokens) - 1, rollout_moe.LAYERS, rollout_moe.CHOSEN)
        folder = tmp_path / f"{member}-{sample.request}"
        truth = rollout_moe.router_choices(moe_engine.base, adapters.get(member or ""), tokens, folder)
        assert [[set(layer) for layer in token] for token in found.tolist()] == truth
        seen.add(str(truth[: len(PROMPT) - 1]))
    assert len(seen) == 3  # the adapters move the routing: sets of the base would not do


def test_samples_carry_no_experts_unless_asked(gateway: Start, moe_engine: EngineProcess, tmp_path: Path) -> None:
    StoredPopulation(f"file://{tmp_path}/store", namespace="team", name="styles")
    service = gateway(engine=moe_engine.url, base_name="moe")
    (sample,) = service.generate([("base", None, PROMPT)])
    assert sample.error is None and sample.experts is None and sample.revision is None


def test_an_engine_that_does_not_tell_its_experts_refuses_the_batch(
    gateway: Start, population: StoredPopulation
) -> None:
    population.commit({"a": random_adapter(1)})
    header = Generate(namespace="team", population="styles", experts=True)
    columns: dict[str, list[object]] = {"member": ["a"], "revision": [1], "prompt": [list(PROMPT)]}
    answer = call(f"{gateway().internal}/v1/generate", encode(header, PROMPTS, columns))
    assert answer.status == 422 and answer.json["code"] == "InvalidRequest"
    assert "--enable-return-routed-experts" in answer.json["message"]


@pytest.mark.parametrize("text", [None, "", "***", "AAAA", "AAAAAAAAAAA=", "/v///w==", "AAABAA=="])
def test_experts_that_do_not_fit_the_tokens_are_refused(text: str | None) -> None:
    """Nothing, no base64, half a number, two numbers for three tokens, −2, and 65536."""
    with pytest.raises(InvalidRequest, match="experts: expected"):
        routed(text, tokens=4 if text == "AAAAAAAAAAA=" else 2)


def test_an_expert_that_the_engine_does_not_know_is_minus_one() -> None:
    assert routed("/////wUAAAA=", tokens=2) == [-1, 5]
