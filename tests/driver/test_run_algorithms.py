"""One run whose parts learn in seven ways, from rewards, answers, pairs and teachers, on a real trainer and engine."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allele.store import Fact
from tests.driver.driver_parts import EXAMPLE, DrivenRun

STEPS = 6
CODE = """
import math
from allele_driver.environments import Answer, Lesson, Pair, Prompt, Said
from environment import Preferences, draw_word, preference_of

NEXT = -0.01  # log-probability of the one right token


class Taught(Preferences):
    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.tokenizer = tokenizer

    def prompts(self, member, rng, n, held_out):
        words = super().prompts(member, rng, n, held_out)
        return [Prompt(text=w, teacher="*" + w) for w in words]

    def right(self, member, prompt):
        return self.preference(member.index, member.parameters).answer(prompt.rstrip("="))

    def answers(self, member, rng, n):
        words = [draw_word(rng, held=False) + "=" for _ in range(n)]
        return [Answer(w, self.right(member, w)) for w in words]

    def pairs(self, member, rng, n):
        other = preference_of(member.index + 1)
        words = [draw_word(rng, held=False) + "=" for _ in range(n)]
        return [Pair(w, self.right(member, w), Said(text=other.answer(w.rstrip("=")))) for w in words]

    def teach(self, member, prompt, completion):
        right = [*self.tokenizer.encode(self.right(member, prompt.text)), *self.tokenizer.stop_token_ids]
        places = [(right[i] if i < len(right) else right[-1]) for i in range(len(completion.ids))]
        ids = [i for p in places for i in (p, 0 if p else 2)]
        return Lesson(tuple(ids), (NEXT, math.log(1 - math.exp(NEXT)) - 1) * len(places))
"""
ALGORITHMS: list[dict[str, Any]] = [
    {"name": "SFT", "promptsPerStep": 8},
    {"name": "DPO", "promptsPerStep": 8},
    {"name": "Distillation", "divergence": "Forward", "topK": 8, "promptsPerStep": 8},
    {"name": "Distillation", "teacher": "Environment", "topK": 2, "divergence": "Forward", "promptsPerStep": 8},
    {"name": "REINFORCE++", "groupSize": 2, "promptsPerStep": 8, "kl": {"coefficient": 0.01}},
    {"name": "DAPO", "refills": 2},
    {"name": "CISPO", "oldPolicy": "Trainer", "correction": {"kind": "TIS"}, "kl": {"coefficient": 0.01}},
]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    shutil.copy(EXAMPLE / "environment.py", folder)
    (folder / "taught.py").write_text(CODE)
    return folder


def test_members_of_one_run_learn_each_in_its_own_way(run: Callable[..., DrivenRun], code: Path) -> None:
    optimizer = {"learningRate": 0.01, "schedule": "Cosine", "warmupSteps": 2, "horizon": STEPS}
    groups = [
        {
            "select": {"group": "taste", "range": {"first": i, "count": 1}},
            "algorithm": algorithm,
            "environment": {"path": "taught:Taught"},
            "optimizer": optimizer,
            "sampling": {"maxTokens": 8},
        }
        for i, algorithm in enumerate(ALGORITHMS)
    ]
    found = run("ways", members=len(ALGORITHMS), steps=STEPS, code=code, groups=groups)
    driver = found.start()
    assert driver.wait() == 0, driver.output()[-3000:]
    committed = found.committed()
    trained = {i: committed[f"taste-{i:04d}"][1:] for i in range(len(ALGORITHMS))}
    for i, facts in trained.items():
        own = [f.metrics["own_step"] for f in facts]
        assert own == list(range(1, len(facts) + 1)), ALGORITHMS[i]
        rates = {1: 0.005, 2: 0.01, 4: 0.01 * (1 + math.cos(math.pi / 2)) / 2}
        for f in facts:
            assert math.isfinite(f.metrics["loss"]) and f.metrics["entropy"] > 0
            if (expected := rates.get(int(f.metrics["own_step"]))) is not None:
                assert f.metrics["learning_rate"] == pytest.approx(expected, abs=1e-12)
    sft, dpo, by_base, taught, plus, dapo, cispo = (trained[i] for i in range(7))
    assert all(len(facts) == STEPS for facts in (sft, dpo, by_base, taught))
    assert len(plus) > 0 and len(cispo) > 0 and len(dapo) > 0
    assert _falls(sft, "loss") and _falls(dpo, "loss") and _falls(by_base, "kl") and _falls(taught, "kl")
    assert dpo[-1].metrics["accuracy"] > 0.9
    assert "reward" not in sft[0].metrics and "reward" in taught[0].metrics
    assert plus[-1].metrics.keys() >= {"kl", "ratio_mean", "logprob_gap", "reward"}
    assert cispo[0].metrics["ratio_mean"] == pytest.approx(1) and cispo[0].metrics["rejected_fraction"] == 0
    kinds = [found.population.read_provenance(trained[i][0].provenance or "").loss["kind"] for i in trained]
    assert kinds == ["SFT", "DPO", "Distillation", "Distillation", "Clip", "Clip", "CISPO"]


def _falls(facts: list[Fact], metric: str) -> bool:
    """By more than a tenth from the first step to the last."""
    return facts[-1].metrics[metric] < 0.9 * facts[0].metrics[metric]


def test_an_environment_without_what_the_algorithm_needs_is_refused_at_the_start(
    run: Callable[..., DrivenRun],
) -> None:
    group = {
        "select": {"group": "taste"},
        "algorithm": {"name": "DPO"},
        "environment": {"path": "environment:Preferences"},
        "optimizer": {"learningRate": 0.01},
    }
    driver = run("without-pairs", groups=[group]).start()
    assert driver.wait() == 2
    assert "expected pairs(self, member, rng, n) -> list[Pair], found no method Preferences.pairs" in driver.output()
