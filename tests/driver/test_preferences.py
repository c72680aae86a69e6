"""The example: its rewards, its files as the resources they claim to be, and its base's digest."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from types import ModuleType

import pytest
import yaml

from allele.api.pool import BasePoolSpec
from allele.api.population import AdapterPopulationSpec
from allele.api.run import RLRunSpec
from allele.api.runtime import AdapterRuntimeSpec
from allele.api.store import AdapterStoreSpec
from allele_driver.environments import Completion, MemberView, Prompt
from allele_driver.tokenizer import HfTokenizer
from tests.driver.driver_parts import BASE, DIGEST, EXAMPLE

SPECS = {
    "AdapterStore": AdapterStoreSpec,
    "AdapterRuntime": AdapterRuntimeSpec,
    "BasePool": BasePoolSpec,
    "AdapterPopulation": AdapterPopulationSpec,
    "RLRun": RLRunSpec,
}


def resources() -> dict[str, dict[str, object]]:
    files = sorted(EXAMPLE.glob("0*.yaml"))
    return {doc["kind"]: doc for f in files for doc in yaml.safe_load_all(f.read_text())}


@pytest.fixture(scope="module")
def environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preferences_environment", EXAMPLE / "environment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", SPECS)
def test_files_say_only_what_the_resources_know(kind: str) -> None:
    spec = resources()[kind]["spec"]
    parsed = SPECS[kind].model_validate(spec).model_dump(by_alias=True, mode="json")
    assert unknown(spec, parsed) == []
    assert "namespace" not in resources()[kind]["metadata"]  # type: ignore[operator]


def unknown(given: object, parsed: object, path: str = "spec") -> list[str]:
    """Fields of `given` that the model dropped."""
    if isinstance(given, dict) and isinstance(parsed, dict):
        return [
            p
            for key, value in given.items()
            for p in (unknown(value, parsed[key], f"{path}.{key}") if key in parsed else [f"{path}.{key}"])
        ]
    if isinstance(given, list) and isinstance(parsed, list):
        return [p for g, q in zip(given, parsed, strict=True) for p in unknown(g, q, f"{path}[]")]
    return []


def test_the_digest_in_the_files_is_that_of_the_base() -> None:
    found = resources()
    assert found["BasePool"]["spec"]["base"]["digest"] == DIGEST  # type: ignore[index]
    assert found["AdapterPopulation"]["spec"]["base"]["digest"] == DIGEST  # type: ignore[index]


def test_the_64_preferences_are_different_and_balanced(environment: ModuleType) -> None:
    found = [environment.preference_of(i) for i in range(64)]
    assert len(set(found)) == 64
    assert environment.preference_of(64) == found[0]
    for first16 in zip(*found[:16], strict=True):
        assert sorted(first16.count(v) for v in set(first16)) == [4, 4, 4, 4]


def test_the_reward_is_a_third_for_each_property(environment: ModuleType) -> None:
    word, rng = "kbdac", random.Random(0)
    assert environment.Preference("sort", "*", "lower").answer(word) == "*abcdk*"
    assert environment.Preference("reverse", "|", "upper").answer(word) == "|CADBK|"
    found = [environment.preference_of(i) for i in range(64)]
    for mine, other in rng.sample(list(itertools.product(found, found)), 400):
        same = sum(a == b for a, b in zip(mine, other, strict=True))
        assert mine.reward(word, other.answer(word)) == pytest.approx(same / 3)
    best = environment.Preference("copy", "-", "lower")
    assert best.reward(word, "-kbdac-") == 1
    assert best.reward(word, "-kbdac|") == pytest.approx(2 / 3)
    assert best.reward(word, "") == 0


def test_held_out_words_never_come_back_in_training(environment: ModuleType) -> None:
    made = environment.Preferences(tokenizer=None)
    member = MemberView("m", "taste", 3, {})
    held = made.prompts(member, random.Random(1), 200, True)
    trained = made.prompts(member, random.Random(1), 2000, False)
    assert all(environment.held_out(p.rstrip("=")) for p in held)
    assert not any(environment.held_out(p.rstrip("=")) for p in trained)


def test_scoring_goes_by_index_or_parameters_and_needs_the_stop(environment: ModuleType) -> None:
    made = environment.Preferences(tokenizer=None)
    chosen = {"order": "sort", "sign": "*", "case": "lower"}
    member = MemberView("m", "taste", 3, chosen)
    prompt = Prompt(text="kbdac=")
    assert made.score(member, prompt, Completion((), "*abcdk*", "stop")) == 1
    assert made.score(member, prompt, Completion((), "*abcdk*", "length")) == pytest.approx(2 / 3)
    own = environment.preference_of(3).answer("kbdac")
    assert made.score(MemberView("m", "taste", 3, {}), prompt, Completion((), own, "stop")) == 1
    with pytest.raises(ValueError, match=r"parameters\.sign: expected one of .* found None"):
        made.score(MemberView("m", "taste", 3, {"order": "sort"}), prompt, Completion((), own, "stop"))


def test_the_tokenizer_has_a_token_for_each_character() -> None:
    tokenizer = HfTokenizer((BASE / "tokenizer.json").read_text(), (1,))
    assert tokenizer.encode("kbdac=") == [13, 4, 6, 3, 5, 2]
    assert tokenizer.decode([35, 3, 19, 38, 1]) == "*aA~"
