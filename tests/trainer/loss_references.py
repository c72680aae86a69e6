"""Each loss written out once more, from its paper, in Python floats and loops over sequences: shares no code with ours.

`moved` are the logprobs that the loss is a function of; `fixed` the same numbers where a formula says stop-gradient, so
that finite differences of these functions in `moved` are the gradients that training should see.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from allele.protocol.losses import Correction, DistillationLoss, PolicyLoss, PreferenceLoss, SupervisedLoss

Numbers = list[list[float]]
"""By sequence and token."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences of one member."""

    rollout: Numbers
    advantages: Numbers
    reference: Numbers


def policy_loss(spec: PolicyLoss, case: Case, moved: Numbers, fixed: Numbers) -> float:
    values: Numbers = []
    for x, x0, r, adv, ref in zip(moved, fixed, case.rollout, case.advantages, case.reference, strict=True):
        old = r if spec.against == "Rollout" else x0
        weights = correction_weights(spec.correction, x0, r) if spec.correction else [1.0] * len(x)
        if spec.correction and spec.against == "Rollout":
            weights = [float(w != 0) for w in weights]
        row = []
        for t in range(len(x)):
            if spec.kind == "CISPO":
                value = -min(math.exp(x0[t] - old[t]), 1 + spec.clip_high) * adv[t] * x[t]
            else:
                rho = math.exp(log_ratio(spec.ratio, x, old, t))
                inside = min(max(rho, 1 - spec.clip_low), 1 + spec.clip_high)
                value = -min(rho * adv[t], inside * adv[t])
            value *= weights[t]
            if spec.kl and spec.kl.estimator == "K2":
                value += spec.kl.coefficient * (x[t] - ref[t]) ** 2 / 2
            if spec.kl and spec.kl.estimator == "K3":
                value += spec.kl.coefficient * (math.exp(ref[t] - x[t]) - (ref[t] - x[t]) - 1)
            row.append(value)
        values.append(row)
    return mean_of(values, spec.mean, spec.length)


def log_ratio(level: str, x: Sequence[float], old: Sequence[float], t: int) -> float:
    if level == "Token":
        return x[t] - old[t]
    total = sum(x) - sum(old)
    return total if level == "Sequence" else total / len(x)


def correction_weights(spec: Correction, x: Sequence[float], rollout: Sequence[float]) -> list[float]:
    found = []
    for t in range(len(x)):
        w = math.exp(log_ratio(spec.level, x, rollout, t))
        if spec.kind == "TIS":
            w = max(min(w, spec.high), spec.low or 0.0)
        elif w > spec.high or (spec.low is not None and w < spec.low):
            w = 0.0
        elif spec.kind == "Rejection":
            w = 1.0
        found.append(w)
    if spec.veto is not None and any(math.exp(a - b) < spec.veto for a, b in zip(x, rollout, strict=True)):
        return [0.0] * len(x)
    return found


def mean_of(values: Numbers, mean: str, length: int | None) -> float:
    if mean == "Token":
        return sum(map(sum, values)) / sum(map(len, values))
    if mean == "Sequence":
        return sum(sum(v) / len(v) for v in values) / len(values)
    assert length is not None
    return sum(sum(v) / length for v in values) / len(values)


def supervised_loss(spec: SupervisedLoss, moved: Numbers) -> float:
    return mean_of([[-v for v in row] for row in moved], spec.mean, spec.length)


def preference_loss(spec: PreferenceLoss, case: Case, moved: Numbers) -> float:
    margins = []
    for i in range(0, len(moved), 2):
        chosen = sum(moved[i]) - sum(case.reference[i])
        rejected = sum(moved[i + 1]) - sum(case.reference[i + 1])
        margins.append(spec.beta * (chosen - rejected))
    return sum(math.log(1 + math.exp(-m)) for m in margins) / len(margins)


def distillation_loss(
    spec: DistillationLoss,
    lengths: Sequence[int],
    logits: Sequence[Sequence[float]],
    lessons: Sequence[dict[int, float]],
) -> float:
    """`logits` and `lessons` (id → teacher's logprob) for each token of all sequences."""
    values = []
    for row, lesson in zip(logits, lessons, strict=True):
        total = sum(math.exp(v) for v in row)
        student = {i: math.exp(row[i]) / total for i in lesson}
        events = [(math.exp(p), student[i]) for i, p in lesson.items()]
        if len(lesson) < len(row):
            events.append((1 - sum(p for p, _ in events), 1 - sum(q for _, q in events)))
        if spec.divergence == "Reverse":
            events = [(q, p) for p, q in events]
        values.append(sum(p * math.log(p / q) for p, q in events))
    rows: Numbers = []
    for n in lengths:
        rows.append(values[:n])
        values = values[n:]
    return mean_of(rows, spec.mean, spec.length)


def reinforce_advantages(rewards: Sequence[float], distances: Numbers, beta: float) -> Numbers:
    """REINFORCE++: return to go with the penalty of each token, normalised over all tokens."""
    returns = [[r - beta * sum(d[t:]) for t in range(len(d))] for r, d in zip(rewards, distances, strict=True)]
    every = [v for row in returns for v in row]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in every) / (len(every) - 1))
    return [[(v - mean) / deviation for v in row] for row in returns]
