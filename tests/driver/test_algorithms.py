"""An algorithm's name and fields become the loss that the trainer is told, and rows of what was sampled."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from allele.api.algorithm import DEFAULTS, TAKES, Algorithm, Correction, Kl, Name, Overlong, unfit
from allele.api.run import Optimizer, Sampling, TrainGroup
from allele.protocol import losses
from allele.protocol.commands import AdapterSpec
from allele_driver.algorithms import loss_spec, refills, rows, tells
from allele_driver.environments import Lesson, Prompt
from allele_driver.members import InvalidInput, Member
from allele_driver.recipes import recipes
from allele_driver.rollouts import Drawn, PromptGroup

SAMPLING = Sampling(max_tokens=10)
EXPECTED: dict[str, losses.LossSpec] = {
    "GRPO": losses.PolicyLoss(),
    "DrGRPO": losses.PolicyLoss(mean="Length", length=10, clip_high=0.2),
    "DAPO": losses.PolicyLoss(),
    "GSPO": losses.PolicyLoss(mean="Sequence", ratio="Geometric", clip_low=3e-4, clip_high=4e-4),
    "CISPO": losses.PolicyLoss(kind="CISPO", clip_high=4.0),
    "RLOO": losses.PolicyLoss(mean="Sequence", ratio="Sequence", clip_high=0.2),
    "REINFORCE++": losses.PolicyLoss(clip_high=0.2, whiten=True),
    "REINFORCE++Baseline": losses.PolicyLoss(clip_high=0.2, whiten=True),
    "SFT": losses.SupervisedLoss(),
    "DPO": losses.PreferenceLoss(),
    "Distillation": losses.DistillationLoss(),
}


def algorithm(name: str, **fields: Any) -> Algorithm:
    return Algorithm(name=name, **fields)  # type: ignore[arg-type]


def test_the_defaults_of_every_algorithm() -> None:
    assert set(EXPECTED) == set(get_args(Name)) == set(DEFAULTS)
    for name, loss in EXPECTED.items():
        assert loss_spec(algorithm(name), SAMPLING) == loss, name


def test_fields_reach_the_loss() -> None:
    found = loss_spec(
        algorithm(
            "GRPO",
            clip_low=0.1,
            clip_high=0.4,
            mean="Length",
            old_policy="Trainer",
            correction=Correction(kind="IcePop", level="Geometric", high=3, veto=0.01),
            kl=Kl(coefficient=0.05),
        ),
        SAMPLING,
    )
    assert found == losses.PolicyLoss(
        mean="Length",
        length=10,
        against="Trainer",
        clip_low=0.1,
        clip_high=0.4,
        correction=losses.Correction(kind="IcePop", level="Geometric", low=0.5, high=3, veto=0.01),
        kl=losses.Kl(coefficient=0.05, estimator="K3"),
    )
    plus = loss_spec(algorithm("REINFORCE++", kl=Kl(coefficient=0.1)), SAMPLING)
    assert isinstance(plus, losses.PolicyLoss) and plus.kl is not None and plus.kl.estimator == "K1"
    taught = loss_spec(algorithm("Distillation", divergence="Forward", teacher="Environment", top_k=3), SAMPLING)
    assert taught == losses.DistillationLoss(divergence="Forward", teacher="Given", top_k=3)
    assert loss_spec(algorithm("DPO", beta=0.3), SAMPLING) == losses.PreferenceLoss(beta=0.3)


REWARDS = {"groupSize", "clipHigh", "oldPolicy", "correction", "kl", "overlong"}
FIELDS: dict[str, set[str]] = {
    "GRPO": REWARDS | {"clipLow", "mean", "refills"},
    "DrGRPO": REWARDS | {"clipLow", "mean", "refills"},
    "DAPO": REWARDS | {"clipLow", "mean", "refills"},
    "GSPO": REWARDS | {"clipLow", "refills"},
    "CISPO": REWARDS | {"mean", "refills"},
    "RLOO": REWARDS | {"clipLow", "refills"},
    "REINFORCE++": REWARDS | {"clipLow", "mean"},
    "REINFORCE++Baseline": REWARDS | {"clipLow", "mean"},
    "SFT": {"mean"},
    "DPO": {"beta"},
    "Distillation": {"groupSize", "mean", "divergence", "teacher", "topK"},
}
VALUES: dict[str, Any] = {
    "groupSize": 4,
    "clipLow": 0.1,
    "clipHigh": 0.1,
    "mean": "Token",
    "oldPolicy": "Trainer",
    "correction": {"kind": "MIS"},
    "kl": {"coefficient": 0.1},
    "refills": 2,
    "overlong": {},
    "beta": 0.1,
    "divergence": "Reverse",
    "teacher": "Base",
    "topK": 5,
}


@pytest.mark.parametrize("name", get_args(Name))
def test_what_is_fit_makes_a_loss_and_what_is_not_is_told_in_words(name: str) -> None:
    assert VALUES.keys() == TAKES.keys()
    for field, value in VALUES.items():
        found = Algorithm.model_validate({"name": name, field: value})
        if field in FIELDS[name]:
            assert unfit(found) is None, field
            loss_spec(found, SAMPLING)
        else:
            assert (unfit(found) or "").startswith(f"{field} goes with "), field


def test_what_is_unfit_together() -> None:
    assert "at least 2 with GRPO" in (unfit(algorithm("RLOO", group_size=1)) or "")
    assert unfit(algorithm("REINFORCE++", group_size=1)) is None
    assert "needs oldPolicy Trainer" in (unfit(algorithm("GRPO", correction=Correction(kind="TIS"))) or "")
    assert unfit(algorithm("GRPO", correction=Correction(kind="TIS"), old_policy="Trainer")) is None
    assert "K1 goes with REINFORCE++ only" in (unfit(algorithm("RLOO", kl=Kl(coefficient=1, estimator="K1"))) or "")
    assert "must be less than high" in (unfit(algorithm("GRPO", correction=Correction(kind="IcePop", high=0.4))) or "")


def group(rewards: tuple[float | None, ...], *, prompt: Prompt | None = None, member: str = "m") -> PromptGroup:
    drawn = tuple(Drawn((i, 1), (-0.5 * i, -0.1), "stop") for i in range(3, 3 + len(rewards)))
    return PromptGroup(member, 7, prompt or Prompt(text="x", ids=(9, 2)), drawn, rewards)


def test_rows_carry_exactly_what_the_engine_returned() -> None:
    found = rows([group((0.0, math.nan, 1.0))], algorithm("GRPO"), SAMPLING)
    assert [(r.completion, r.logprobs) for r in found] == [((3, 1), (-1.5, -0.1)), ((5, 1), (-2.5, -0.1))]
    assert {r.prompt for r in found} == {(9, 2)}
    assert found[0].advantage == -(found[1].advantage or 0) < 0
    assert group((0.0, math.nan, 1.0)).kept_rewards() == [0.0, 1.0]


def test_prompts_that_say_nothing_are_left_out_and_no_more_are_used_than_wanted() -> None:
    groups = [group((1.0, 1.0)), *[group((0.0, float(i))) for i in range(1, 5)]]
    found = rows(groups, algorithm("DAPO", prompts_per_step=3), SAMPLING)
    assert len(found) == 6
    assert [tells(g, algorithm("DAPO")) for g in groups] == [False, True, True, True, True]
    assert (refills(algorithm("DAPO")), refills(algorithm("GRPO")), refills(algorithm("GRPO", refills=2))) == (3, 0, 2)
    assert tells(groups[0], algorithm("REINFORCE++"))
    assert rows(groups[:1], algorithm("REINFORCE++"), SAMPLING) == []
    assert len(rows(groups[:1], algorithm("REINFORCE++", kl=Kl(coefficient=0.1)), SAMPLING)) == 2


def test_long_answers_lose_before_they_are_compared() -> None:
    lengths = (2, 9, 10)
    drawn = tuple(Drawn((3,) * n, (-1.0,) * n, "stop") for n in lengths)
    alike = PromptGroup("m", 7, Prompt(ids=(9,)), drawn, (1.0, 1.0, 0.9))
    plain = rows([alike], algorithm("DrGRPO"), SAMPLING)
    assert [r.advantage for r in plain] == pytest.approx([1 / 30, 1 / 30, -2 / 30])
    shaped = rows([alike], algorithm("DrGRPO", overlong=Overlong(cache_tokens=2, penalty=0.4)), SAMPLING)
    rewards = [1.0, 1.0 - 0.2, 0.9 - 0.4]
    mean = sum(rewards) / 3
    assert [r.advantage for r in shaped] == pytest.approx([r - mean for r in rewards])
    by_default = rows([alike], algorithm("DAPO"), SAMPLING)  # a fifth of 10 tokens, penalty 1
    assert by_default[1].advantage != by_default[0].advantage


def test_a_teachers_lessons_go_with_their_samples() -> None:
    prompt = Prompt(ids=(9, 2), teacher_ids=(7, 9, 2))
    plain = group((1.0, None), prompt=prompt)
    base = rows([plain], algorithm("Distillation"), SAMPLING)
    assert [r.teacher_prompt for r in base] == [(7, 9, 2), (7, 9, 2)] and base[0].teacher_ids is None
    lesson = Lesson((4, 5, 6, 7), (-0.1, -2.0, -0.2, -3.0))
    taught = PromptGroup("m", 7, prompt, plain.drawn, plain.rewards, (None, lesson))
    (only,) = rows([taught], algorithm("Distillation", teacher="Environment", top_k=2), SAMPLING)
    assert (only.completion, only.teacher_ids, only.teacher_prompt) == ((4, 1), lesson.ids, None)


def member(name: str, **parameters: Any) -> Member:
    spec = AdapterSpec(rank=8, alpha=16, targets=("q_proj",))
    return Member(name=name, group="g", index=0, parameters=parameters, adapter=spec, seed=0)


def train_group(**fields: Any) -> TrainGroup:
    return TrainGroup.model_validate(
        {"select": {"group": "g"}, "environment": {"path": "a:B"}, "optimizer": {"learningRate": 0.01}} | fields
    )


def test_members_override_their_optimizer_and_their_loss() -> None:
    spec = train_group(algorithm={"name": "GRPO", "clipHigh": 0.3})
    own = {"optimizer": {"learningRate": 0.5, "warmupSteps": 2}, "algorithm": {"kl": {"coefficient": 0.1}}}
    found = recipes(spec, [member("usual", color="red"), member("own", **own)])
    assert found["usual"].optimizer == Optimizer(learning_rate=0.01)
    assert found["own"].optimizer == Optimizer(learning_rate=0.5, warmup_steps=2)
    assert found["own"].algorithm == algorithm("GRPO", clip_high=0.3, kl=Kl(coefficient=0.1))
    assert found["usual"].algorithm is spec.algorithm


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"optimizer": 3}, "member m, parameters.optimizer: expected an object, found 3"),
        ({"optimizer": {"lr": 0.1}}, "member m, parameters.optimizer: expected fields out of .*, found 'lr'"),
        ({"optimizer": {"learningRate": -1}}, "member m, parameters.optimizer.learningRate: .* found -1"),
        ({"optimizer": {"horizon": 3, "warmupSteps": 3}}, r"optimizer.warmupSteps: expected less than horizon \(3\)"),
        ({"algorithm": {"groupSize": 3}}, "parameters.algorithm.groupSize: expected the run's own"),
        ({"algorithm": {"beta": 0.3}}, "member m, algorithm: beta goes with DPO only"),
        ({"algorithm": {"correction": {"kind": "TIS"}}}, "member m, algorithm: correction TIS needs oldPolicy Trainer"),
    ],
)
def test_overrides_that_cannot_be_are_refused_with_member_and_field(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        recipes(train_group(), [member("m", **parameters)])


def test_a_run_that_the_api_server_never_saw_is_checked_too() -> None:
    with pytest.raises(InvalidInput, match="group g, algorithm: topK goes with Distillation only"):
        recipes(train_group(algorithm={"name": "GRPO", "topK": 3}), [])
