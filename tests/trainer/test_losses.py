"""Losses as functions: values and gradients are those of written-out papers, and of TRL where it has them."""

from __future__ import annotations

import collections
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from allele.protocol.losses import (
    Correction,
    DistillationLoss,
    Kl,
    LossSpec,
    PolicyLoss,
    PreferenceLoss,
    SupervisedLoss,
)
from allele_trainer.model.distribution import Distribution, distribution
from allele_trainer.rl.losses import LOSSES, Sequences, Teacher, Terms, Tokens
from allele_trainer.rl.rewards import whitened
from allele_trainer.rl.weights import row_weights
from tests.trainer import loss_references as papers
from tests.trainer.loss_references import Case, Numbers

LENGTHS = (5, 1, 7, 3, 2, 6)
STEP = 1e-5
IS = {"low": 0.6, "high": 1.6}
POLICIES: dict[str, PolicyLoss] = {
    "GRPO": PolicyLoss(),
    "GRPO, sequence mean": PolicyLoss(mean="Sequence", clip_high=0.2),
    "Dr. GRPO": PolicyLoss(mean="Length", length=16),
    "GSPO": PolicyLoss(ratio="Geometric", mean="Sequence", clip_low=0.1, clip_high=0.15),
    "CISPO": PolicyLoss(kind="CISPO", clip_high=0.3),
    "RLOO": PolicyLoss(ratio="Sequence", mean="Sequence"),
    "trainer's policy": PolicyLoss(against="Trainer"),
    "K2": PolicyLoss(kl=Kl(coefficient=0.3, estimator="K2")),
    "K3": PolicyLoss(kl=Kl(coefficient=0.3, estimator="K3")),
    "veto": PolicyLoss(correction=Correction(kind="Rejection", low=0.1, high=9, veto=0.6)),
}
for _kind in ("TIS", "MIS", "IcePop", "Rejection"):
    for _level in ("Token", "Sequence", "Geometric"):
        _found = Correction(kind=_kind, level=_level, **IS)  # type: ignore[arg-type]
        POLICIES[f"{_kind}, {_level}"] = PolicyLoss(against="Trainer", correction=_found)
        if _kind != "TIS":
            POLICIES[f"{_kind}, {_level}, rollout"] = PolicyLoss(correction=_found)


def case(seed: int = 0, *, spread: float = 0.35, lengths: Sequence[int] = LENGTHS) -> tuple[Case, Numbers]:
    """A case and the trainer's logprobs; those of a sequence differ from the rollout's by about `spread`."""
    rng = np.random.default_rng(seed)
    now = [(-rng.exponential(1.0, n) - 0.05).tolist() for n in lengths]
    rollout = [(np.array(x) - spread * rng.normal(size=len(x))).tolist() for x in now]
    reference = [(np.array(x) - spread * rng.normal(size=len(x))).tolist() for x in now]
    advantages = [[a] * n for a, n in zip(rng.normal(size=len(lengths)).tolist(), lengths, strict=True)]
    return Case(rollout, advantages, reference), now


def flat(rows: Numbers) -> Tensor:
    return torch.tensor([v for row in rows for v in row], dtype=torch.float64)


def sequences(lengths: Sequence[int]) -> Sequences:
    return Sequences(lengths, torch.float64, torch.device("cpu"))


def ours(spec: LossSpec, given: Case, now: Numbers) -> tuple[float, Tensor, Terms]:
    """Value, gradient by the logprobs `[n]`, and the terms."""
    lengths = [len(row) for row in now]
    logprobs = flat(now).requires_grad_()
    tokens = Tokens(
        logprobs,
        sequences(lengths),
        rollout=flat(given.rollout),
        advantages=flat(given.advantages),
        reference=flat(given.reference),
    )
    terms = LOSSES[spec.kind](tokens, spec)
    weights = flat([[w] * n for w, n in zip(row_weights(lengths, spec), lengths, strict=True)])
    loss = (terms.loss * weights).sum()
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient, terms


def differences(loss: Callable[[Numbers], float], at: Numbers) -> Tensor:
    """Central differences, one token at a time."""
    found = []
    for i, row in enumerate(at):
        for t in range(len(row)):
            sides = []
            for sign in (1, -1):
                moved = [list(r) for r in at]
                moved[i][t] += sign * STEP
                sides.append(loss(moved))
            found.append((sides[0] - sides[1]) / (2 * STEP))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_loss_and_its_gradient_are_what_the_paper_says(name: str, seed: int) -> None:
    spec = POLICIES[name]
    given, now = case(seed)
    value, gradient, _ = ours(spec, given, now)
    assert value == pytest.approx(papers.policy_loss(spec, given, now, now), rel=1e-12)
    expected = differences(lambda moved: papers.policy_loss(spec, given, moved, now), now)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert gradient.count_nonzero() > 0


def test_the_corrections_tried_above_reject_some_tokens_and_keep_some() -> None:
    for name, spec in POLICIES.items():
        if spec.correction is not None and spec.correction.kind != "TIS":
            rejected = [ours(spec, *case(seed))[2].rejected for seed in (0, 1)]
            share = torch.cat([r for r in rejected if r is not None]).double().mean()
            assert 0 < share < 1, f"{name}: {share}"


def test_supervised_and_preference_losses_are_what_the_papers_say() -> None:
    given, now = case()
    for sft in (SupervisedLoss(), SupervisedLoss(mean="Sequence")):
        value, gradient, _ = ours(sft, given, now)
        assert value == pytest.approx(papers.supervised_loss(sft, now), rel=1e-12)
        expected = differences(lambda moved, s=sft: papers.supervised_loss(s, moved), now)  # type: ignore[misc]
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    dpo = PreferenceLoss(beta=0.7)
    value, gradient, terms = ours(dpo, given, now)
    assert value == pytest.approx(papers.preference_loss(dpo, given, now), rel=1e-12)
    torch.testing.assert_close(
        gradient, differences(lambda moved: papers.preference_loss(dpo, given, moved), now), rtol=1e-6, atol=1e-9
    )
    assert terms.ranked is not None and 0 < terms.ranked.mean() < 1


@pytest.mark.parametrize("k", [3, 11])
@pytest.mark.parametrize("divergence", ["Forward", "Reverse"])
def test_distillation_is_the_divergence_over_the_top_and_the_rest(divergence: str, k: int) -> None:
    spec = DistillationLoss(divergence=divergence, top_k=k)  # type: ignore[arg-type]
    rng = np.random.default_rng(3)
    n, vocab = sum(LENGTHS), 11
    student = rng.normal(size=(n, vocab))
    teacher = torch.log_softmax(torch.tensor(2 * rng.normal(size=(n, vocab))), -1)
    top = teacher.topk(k)
    lessons = [dict(zip(i, p, strict=True)) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]

    value, gradient = distilled(spec, torch.tensor(student), top.indices, top.values)
    assert value == pytest.approx(papers.distillation_loss(spec, LENGTHS, student.tolist(), lessons), rel=1e-6)
    expected = differences(lambda moved: papers.distillation_loss(spec, LENGTHS, moved, lessons), student.tolist())
    torch.testing.assert_close(gradient.flatten(), expected.to(gradient), rtol=1e-4, atol=1e-7)


def whole(logits: Tensor) -> Distribution:
    return distribution(logits, rows=logits.shape[0], vocab=logits.shape[1], group=None)


def distilled(spec: DistillationLoss, logits: Tensor, ids: Tensor, lesson: Tensor) -> tuple[float, Tensor]:
    """Value, and gradient by the student's logits."""
    logits = logits.clone().requires_grad_()
    found = whole(logits)
    teacher = Teacher(lesson, found.at(ids), complete=ids.shape[1] == logits.shape[1])
    tokens = Tokens(found.normaliser, sequences(LENGTHS), teacher=teacher)
    weights = flat([[w] * n for w, n in zip(row_weights(LENGTHS, spec), LENGTHS, strict=True)])
    loss = (LOSSES[spec.kind](tokens, spec).loss * weights).sum()
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


def test_a_teacher_that_knows_one_token_for_sure_gives_finite_gradients() -> None:
    logits = torch.zeros(sum(LENGTHS), 5, dtype=torch.float64)
    ids = torch.zeros(sum(LENGTHS), 1, dtype=torch.int64)
    for divergence in ("Forward", "Reverse"):
        spec = DistillationLoss(divergence=divergence, top_k=1)  # type: ignore[arg-type]
        value, gradient = distilled(spec, logits, ids, torch.zeros(sum(LENGTHS), 1, dtype=torch.float64))
        assert math.isfinite(value) and gradient.isfinite().all() and gradient.count_nonzero() > 0


def test_reinforce_advantages_are_normalised_returns_with_each_tokens_penalty() -> None:
    given, now = case()
    rewards = [1.0, 0.0, 0.5, 1.0, 0.0, 0.25]
    distances = [[a - b for a, b in zip(x, r, strict=True)] for x, r in zip(now, given.reference, strict=True)]
    found = whitened(rewards, LENGTHS, distances=[np.array(d, np.float32) for d in distances], coefficient=0.1)
    for mine, theirs in zip(found, papers.reinforce_advantages(rewards, distances, 0.1), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    plain = whitened(rewards, LENGTHS)
    for mine, theirs in zip(
        plain, papers.reinforce_advantages(rewards, [[0.0] * n for n in LENGTHS], 0.0), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert [a.tolist() for a in whitened([0.5], [1])] == [[0.0]]


def test_entropy_and_top_of_a_distribution() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 17)
    found = whole(logits)
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(found.entropy, expected.entropy())
    ids, logprobs = found.top(4)
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).gather(1, ids))
    assert torch.equal(ids, logits.topk(4).indices)
    assert found.top(99)[0].shape == (64, 17)


# -- TRL's own code, unmodified: its loss methods, given the logprobs that a model would have computed.


def padded(rows: Numbers) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r, dtype=torch.float64) for r in rows], batch_first=True)


def unpadded(values: Tensor) -> Tensor:
    return torch.cat([values[i, :n] for i, n in enumerate(LENGTHS)])


class Accelerator:
    device = torch.device("cpu")
    num_processes = 1

    def gather(self, value: Tensor) -> Tensor:
        return value

    def gather_for_metrics(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value


def trl_self(logprobs: Tensor, **settings: Any) -> Any:
    """What TRL's loss methods read of their trainer."""
    return types.SimpleNamespace(
        accelerator=Accelerator(),
        model=torch.nn.Linear(1, 1).eval(),
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        max_completion_length=16,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_a, **_k: (logprobs, torch.zeros_like(logprobs), None),
        **settings,
    )


def trl_inputs(given: Case) -> dict[str, Tensor]:
    mask = padded([[1.0] * n for n in LENGTHS])
    return {
        "prompt_ids": torch.zeros(len(LENGTHS), 2, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 2, dtype=torch.int64),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": torch.tensor([row[0] for row in given.advantages], dtype=torch.float64),
        "old_per_token_logps": padded(given.rollout),
        "ref_per_token_logps": padded(given.reference),
        "num_items_in_batch": mask.sum(),
    }


TRL_GRPO = {
    "GRPO": {"loss_type": "dapo"},
    "GRPO, sequence mean": {"loss_type": "grpo"},
    "Dr. GRPO": {"loss_type": "dr_grpo"},
    "GSPO": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "CISPO": {"loss_type": "cispo"},
    "K3": {"loss_type": "dapo", "beta": 0.3},
}


@pytest.mark.parametrize("name", TRL_GRPO)
def test_group_losses_are_trls(name: str) -> None:
    from trl import GRPOTrainer

    spec = POLICIES[name]
    given, now = case()
    logprobs = padded(now).requires_grad_()
    settings = {
        "epsilon_low": spec.clip_low,
        "epsilon_high": 1 + spec.clip_high if spec.kind == "CISPO" else spec.clip_high,
        "importance_sampling_level": "token",
        "beta": 0.0,
    }
    theirs = GRPOTrainer._compute_loss(trl_self(logprobs, **settings | TRL_GRPO[name]), None, trl_inputs(given))
    value, gradient, _ = ours(spec, given, now)
    assert value == pytest.approx(theirs.item(), rel=1e-12)
    torch.testing.assert_close(gradient, unpadded(torch.autograd.grad(theirs, logprobs)[0]), rtol=1e-9, atol=1e-12)


def test_leave_one_out_is_trls() -> None:
    from trl import RLOOTrainer

    spec = POLICIES["RLOO"]
    given, now = case()
    logprobs = padded(now).requires_grad_()
    inputs = trl_inputs(given) | {"old_logps": padded(given.rollout).sum(1)}
    settings = {"epsilon_low": spec.clip_low, "epsilon_high": spec.clip_high}
    theirs = RLOOTrainer._compute_loss(trl_self(logprobs, **settings), None, inputs)
    value, gradient, _ = ours(spec, given, now)
    assert value == pytest.approx(theirs.item(), rel=1e-12)
    torch.testing.assert_close(gradient, unpadded(torch.autograd.grad(theirs, logprobs)[0]), rtol=1e-9, atol=1e-12)


def test_preferences_are_trls() -> None:
    from trl import DPOTrainer

    given, now = case()
    spec = PreferenceLoss(beta=0.7)
    order = [0, 2, 4, 1, 3, 5]  # all chosen ones, then all rejected ones
    logprobs = padded([now[i] for i in order]).requires_grad_()
    references = torch.tensor([sum(given.reference[i]) for i in order], dtype=torch.float64)
    ids = torch.zeros(6, 1 + logprobs.shape[1], dtype=torch.int64)
    zeros = torch.zeros_like(logprobs.detach())
    told = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}  # for TRL's report alone
    outputs = types.SimpleNamespace(log_probs=logprobs, **told)
    settings = {
        "precompute_ref_logps": True,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "beta": spec.beta,
        "label_smoothing": 0.0,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "use_weighting": False,
        "_total_train_tokens": 0,
    }
    mask = padded([[0.0] + [1.0] * LENGTHS[i] for i in order])
    inputs = {"input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(ids)}
    inputs |= {"ref_chosen_logps": references[:3], "ref_rejected_logps": references[3:]}
    model = lambda **_: outputs  # noqa: E731 - what TRL calls a model here
    theirs = DPOTrainer._compute_loss(trl_self(logprobs, **settings), model, inputs, False)
    value, gradient, _ = ours(spec, given, now)
    assert value == pytest.approx(theirs.item(), rel=1e-12)
    expected = torch.autograd.grad(theirs, logprobs)[0]
    parts = {i: expected[place, : LENGTHS[i]] for place, i in enumerate(order)}
    torch.testing.assert_close(gradient, torch.cat([parts[i] for i in range(6)]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("divergence", "beta"), [("Forward", 0.0), ("Reverse", 1.0)])
def test_distillation_over_a_whole_vocabulary_is_trls(divergence: str, beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    rng = np.random.default_rng(5)
    n, vocab = sum(LENGTHS), 9
    logits = torch.tensor(rng.normal(size=(n, vocab)))
    lesson = torch.log_softmax(torch.tensor(2 * rng.normal(size=(n, vocab))), -1)
    theirs_logits = logits.clone().requires_grad_()
    labels = torch.zeros(1, n, dtype=torch.int64)
    theirs = GKDTrainer.generalized_jsd_loss(theirs_logits[None], lesson[None], labels=labels, beta=beta)
    theirs.backward()
    spec = DistillationLoss(divergence=divergence, top_k=vocab)  # type: ignore[arg-type]
    value, gradient = distilled(spec, logits, lesson.topk(vocab).indices, lesson.topk(vocab).values)
    assert value == pytest.approx(theirs.item(), rel=1e-6)
    assert theirs_logits.grad is not None
    torch.testing.assert_close(gradient, theirs_logits.grad, rtol=1e-4, atol=1e-7)
