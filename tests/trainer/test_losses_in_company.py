"""Members with different losses in one command and pass: each learns what its paper says, as if alone."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from allele.protocol.errors import InvalidRequest
from allele.protocol.losses import (
    Correction,
    DistillationLoss,
    Kl,
    LossSpec,
    PolicyLoss,
    PreferenceLoss,
    SupervisedLoss,
)
from tests.trainer import loss_references as papers
from tests.trainer.loss_references import Case, Numbers
from tests.trainer.test_losses import differences
from tests.trainer.trainer_parts import Example, Rig, adapter, examples, same_rows, start
from tests.trainer.twin import PeftTwin

VOCAB = 96
TOP = 7
LOSSES: dict[str, LossSpec] = {
    "grpo": PolicyLoss(),
    "dr-grpo": PolicyLoss(mean="Length", length=9),
    "gspo": PolicyLoss(ratio="Geometric", mean="Sequence", clip_low=0.5, clip_high=0.9),
    "cispo": PolicyLoss(kind="CISPO", clip_high=1.0, kl=Kl(coefficient=0.2, estimator="K3")),
    "rloo": PolicyLoss(ratio="Sequence", mean="Sequence", kl=Kl(coefficient=0.2, estimator="K2")),
    "reinforce": PolicyLoss(whiten=True, kl=Kl(coefficient=0.3, estimator="K1")),
    "corrected": PolicyLoss(against="Trainer", correction=Correction(kind="MIS", low=0.2, high=2.0, veto=0.01)),
    "sft": SupervisedLoss(),
    "dpo": PreferenceLoss(beta=0.5),
    "dpo-given": PreferenceLoss(beta=0.5),
    "taught-by-base": DistillationLoss(divergence="Forward", top_k=TOP),
    "taught": DistillationLoss(divergence="Reverse", teacher="Given", top_k=TOP),
}
MEMBERS = tuple(LOSSES)
EVERY = tuple(LOSSES.values())


def rows(members: Sequence[str] = MEMBERS, *, seed: int = 0) -> list[Example]:
    """Four rows of each member, with what its loss needs; a member's rows depend on its name and the seed alone."""
    found = examples(members, each=4, vocab=VOCAB, seed=seed)
    return [_with_columns(e, LOSSES[e.member], i % 4) for i, e in enumerate(found)]


def _with_columns(e: Example, loss: LossSpec, number: int) -> Example:
    rng = np.random.default_rng([*e.prompt, *e.completion])
    own: dict[str, Any] = {"loss": MEMBERS.index(e.member)}
    if not isinstance(loss, PolicyLoss):
        own |= {"logprobs": None, "advantage": None}
    if isinstance(loss, PreferenceLoss):
        own["pair"] = number // 2
        if e.member == "dpo-given":
            own["reference"] = (-4 + rng.normal(size=len(e.completion))).astype(np.float32).tolist()
    if isinstance(loss, DistillationLoss) and loss.teacher == "Base":
        own["teacher_prompt"] = [3, 1, *e.prompt]
    if isinstance(loss, DistillationLoss) and loss.teacher == "Given":
        places = [rng.choice(VOCAB, TOP, replace=False) for _ in e.completion]
        chances = [np.log(rng.dirichlet(np.ones(TOP + 1))[:TOP]) for _ in e.completion]
        own["teacher_ids"] = np.concatenate(places).tolist()
        own["teacher_logprobs"] = np.concatenate(chances).astype(np.float32).tolist()
    return dataclasses.replace(e, **own)


class Trained:
    """A rig whose members start from random weights, both factors."""

    def __init__(self, rig: Rig, members: Sequence[str] = MEMBERS) -> None:
        self.rig, self.spec = rig, adapter()
        self.weights = {m: rig.random_weights(m, self.spec, seed=MEMBERS.index(m)) for m in members}
        rig.reset([start(m, self.spec, weights=self.weights[m]) for m in members])
        rig.admit(*members)

    def gradient(self, member: str) -> torch.Tensor:
        table = self.rig.trainer._runs["run"].tables[member]
        (slot,) = self.rig.admit(member).values()
        return table.bank.gradient(slot).clone()


def test_every_members_loss_and_gradient_are_its_papers(
    rig: Callable[..., Rig], base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    trained = Trained(rig(slots=len(MEMBERS), max_tokens=50))  # several micro-batches
    given = rows()
    told = trained.rig.forward_backward(given, losses=EVERY)
    for member in MEMBERS:
        packed = trained.rig.store.read(trained.weights[member])
        twin = PeftTwin(base, trained.rig.shape(trained.spec), packed, trained.spec, tmp_path / member)
        mine = [e for e in given if e.member == member]
        value, gradient = expected(twin, mine, LOSSES[member])
        assert told[member].loss == pytest.approx(value, rel=2e-4, abs=2e-5), member
        found = trained.gradient(member)
        assert (found - gradient).norm() < 1e-3 * gradient.norm(), member
        assert gradient.norm() > 1e-3, member
    report = told["corrected"]
    assert report.rejected_fraction is not None and 0 < report.rejected_fraction < 1
    assert told["dpo"].accuracy == pytest.approx(0.5) and told["dpo"].logprob_gap is None
    assert (told["cispo"].kl or 0) > 0 and told["grpo"].kl is None
    assert all(0 < t.entropy < math.log(VOCAB) for t in told.values())


def expected(twin: PeftTwin, mine: Sequence[Example], loss: LossSpec) -> tuple[float, torch.Tensor]:
    """The written-out loss at PEFT's own probabilities, and its differences carried through PEFT's own backward."""
    logits = [twin_logits(twin, e.prompt, e.completion) for e in mine]
    flat = torch.cat([torch.log_softmax(x, -1).gather(1, torch.tensor(e.completion)[:, None])[:, 0]
                      for x, e in zip(logits, mine, strict=True)])  # fmt: skip
    now = split(flat.tolist(), mine)
    with twin.model.disable_adapter(), torch.no_grad():
        base = split(torch.cat([twin.logprobs(e.prompt, e.completion) for e in mine]).tolist(), mine)
    if isinstance(loss, DistillationLoss):
        lengths, lessons = [len(e.completion) for e in mine], lessons_of(twin, mine, loss)
        every = torch.cat(logits)

        def divergence(moved: Numbers) -> float:
            return papers.distillation_loss(loss, lengths, moved, lessons)

        return through(every, divergence(every.tolist()), differences(divergence, every.tolist()), twin)
    case = Case([e.logprobs or [] for e in mine], advantages(mine, loss, base), base)
    if isinstance(loss, PreferenceLoss):
        case = dataclasses.replace(case, reference=[e.reference or b for e, b in zip(mine, base, strict=True)])

    def value(moved: Numbers) -> float:
        if isinstance(loss, SupervisedLoss):
            return papers.supervised_loss(loss, moved)
        if isinstance(loss, PreferenceLoss):
            return papers.preference_loss(loss, case, moved)
        assert isinstance(loss, PolicyLoss)
        return papers.policy_loss(loss, case, moved, now)

    return through(flat, value(now), differences(value, now), twin)


def advantages(mine: Sequence[Example], loss: LossSpec, base: Numbers) -> Numbers:
    given = [e.advantage or 0.0 for e in mine]
    if not isinstance(loss, PolicyLoss) or not loss.whiten:
        return [[a] * len(e.completion) for a, e in zip(given, mine, strict=True)]
    distances = [[p - b for p, b in zip(e.logprobs or (), ref, strict=True)] for e, ref in zip(mine, base, strict=True)]
    return papers.reinforce_advantages(given, distances, loss.kl.coefficient if loss.kl else 0.0)


def through(values: torch.Tensor, loss: float, slopes: torch.Tensor, twin: PeftTwin) -> tuple[float, torch.Tensor]:
    """Gradient by the adapter's parameters of a function with these slopes in `values`."""
    (values.flatten() * slopes.to(values)).sum().backward()
    return loss, twin._row({n: p.grad for n, p in twin.parameters.items()})


def twin_logits(twin: PeftTwin, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    logits: torch.Tensor = twin.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits


def lessons_of(twin: PeftTwin, mine: Sequence[Example], loss: DistillationLoss) -> list[dict[int, float]]:
    found: list[dict[int, float]] = []
    for e in mine:
        if loss.teacher == "Given":
            assert e.teacher_ids is not None and e.teacher_logprobs is not None
            pairs = list(zip(e.teacher_ids, e.teacher_logprobs, strict=True))
            found += [dict(pairs[i : i + TOP]) for i in range(0, len(pairs), TOP)]
            continue
        with twin.model.disable_adapter(), torch.no_grad():
            taught = torch.log_softmax(twin_logits(twin, e.teacher_prompt or [], e.completion), -1).topk(TOP)
        found += [
            dict(zip(i, p, strict=True)) for i, p in zip(taught.indices.tolist(), taught.values.tolist(), strict=True)
        ]
    return found


def split(values: Sequence[float], mine: Sequence[Example]) -> Numbers:
    found: Numbers = []
    for e in mine:
        n = sum(map(len, found))
        found.append(list(values[n : n + len(e.completion)]))
    return found


@pytest.mark.parametrize("max_tokens", [40, 8192])
def test_a_members_bits_do_not_depend_on_the_losses_beside_it(rig: Callable[..., Rig], max_tokens: int) -> None:
    steps = [rows(seed=s) for s in range(2)]

    def train(members: Sequence[str], *, slots: int) -> Rig:
        mine = Trained(rig(slots=slots, max_tokens=max_tokens), members).rig
        for found in steps:
            mine.forward_backward([e for e in found if e.member in members], losses=EVERY)
            mine.optim_step(dict.fromkeys(members, 5e-3))
        return mine

    together, backwards = train(MEMBERS, slots=len(MEMBERS)), train(MEMBERS[::-1], slots=len(MEMBERS))
    for member in MEMBERS:
        alone = train([member], slots=1)
        assert same_rows(alone.row(member), together.row(member)), member
        assert same_rows(alone.row(member), backwards.row(member)), member


SPOILED: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"logprobs": math.inf}),
    ("reinforce", {"advantage": math.nan}),
    ("reinforce", {"logprobs": math.nan}),
    ("gspo", {"logprobs": -math.inf}),
    ("dpo-given", {"reference": math.nan}),
    ("taught", {"teacher_logprobs": math.nan}),
]


@pytest.mark.parametrize(("sick", "change"), SPOILED, ids=lambda v: str(v))
def test_numbers_that_are_not_finite_spoil_their_member_alone(
    rig: Callable[..., Rig], sick: str, change: dict[str, Any]
) -> None:
    given = rows()
    place = next(i for i, e in enumerate(given) if e.member == sick)
    ((field, bad),) = change.items()
    whole = getattr(given[place], field)
    spoiled = list(given)
    spoiled[place] = dataclasses.replace(given[place], **{field: [bad, *whole[1:]] if field != "advantage" else bad})
    healthy, ill = (Trained(rig(slots=len(MEMBERS))).rig for _ in range(2))
    before = ill.row(sick)
    for mine, found in ((healthy, given), (ill, spoiled)):
        mine.forward_backward(found, losses=EVERY)
        updates = mine.optim_step(dict.fromkeys(MEMBERS, 5e-3))
        assert [m for m, u in updates.items() if u.skipped] == ([sick] if mine is ill else [])
    assert same_rows(ill.row(sick), before)
    assert all(same_rows(ill.row(m), healthy.row(m)) for m in MEMBERS if m != sick)


REFUSED: list[tuple[str, int, dict[str, Any], str]] = [
    ("grpo", 1, {"loss": 1}, r"row 1, loss: expected 0 as in other rows of grpo, found 1"),
    ("grpo", 0, {"loss": 99}, r"row 0, loss: expected a place in losses, 0\.\.11, found 99"),
    ("grpo", 2, {"logprobs": None}, "row 2, logprobs: expected [0-9]+ values, one per completion token, found None"),
    ("grpo", 2, {"advantage": None}, "row 2, advantage: expected a number"),
    ("dpo", 1, {"pair": 5}, "row 1, pair: expected the second row of pair 0 of dpo, found pair 5"),
    ("dpo", 0, {"pair": None}, "row 0, pair: expected a number that two rows side by side have"),
    ("dpo-given", 0, {"reference": [0.5] * 99}, "row 0, reference: expected [0-9]+ values"),
    ("taught", 3, {"teacher_ids": None}, "row 3, teacher_ids: expected at least one id"),
    ("taught", 3, {"teacher_logprobs": [-1.0]}, "row 3, teacher_logprobs: expected [0-9]+ values, 7 for each"),
    ("taught-by-base", 0, {"teacher_prompt": [1] * 128}, "row 0, teacher_prompt: expected at most 128 tokens"),
    ("taught-by-base", 0, {"teacher_ids": [1]}, "row 0, teacher_ids: expected none: the loss says that the base"),
]


@pytest.mark.parametrize(("member", "row", "change", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_rows_that_do_not_fit_their_loss_are_refused(
    rig: Callable[..., Rig], member: str, row: int, change: dict[str, Any], message: str
) -> None:
    given = rows([member])
    given[row] = dataclasses.replace(given[row], **change)
    with pytest.raises(InvalidRequest, match=message):
        Trained(rig(slots=1), [member]).rig.forward_backward(given, losses=EVERY)


def test_ids_that_a_teacher_gives_twice_are_refused(rig: Callable[..., Rig]) -> None:
    given = rows(["taught"])
    ids = given[0].teacher_ids or []
    given[0] = dataclasses.replace(given[0], teacher_ids=[ids[1], *ids[1:]])
    with pytest.raises(InvalidRequest, match="row 0, teacher_ids: expected different ids for a completion token"):
        Trained(rig(slots=1), ["taught"]).rig.forward_backward(given, losses=EVERY)


def test_a_pair_without_its_second_row_is_refused(rig: Callable[..., Rig]) -> None:
    with pytest.raises(InvalidRequest, match="row 2, pair: expected a second row after it"):
        Trained(rig(slots=1), ["dpo"]).rig.forward_backward(rows(["dpo"])[:3], losses=EVERY)
