"""What an algorithm makes of samples, answers and pairs: the loss that the trainer is told, and its rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from allele.api.algorithm import GROUPED, TOP_K, Algorithm, Correction, Kl
from allele.api.run import Sampling
from allele.protocol import losses
from allele_driver.advantages import ADVANTAGES, overlong, telling, usable
from allele_driver.rollouts import PromptGroup, TrainRow


def loss_spec(algorithm: Algorithm, sampling: Sampling) -> losses.LossSpec:
    """What the trainer minimises."""
    defaults = algorithm.defaults
    if algorithm.name == "DPO":
        return losses.PreferenceLoss(beta=0.1 if algorithm.beta is None else algorithm.beta)
    mean = algorithm.mean or defaults.mean
    length = sampling.max_tokens if mean == "Length" else None
    if algorithm.name == "SFT":
        return losses.SupervisedLoss(mean=mean, length=length)
    if algorithm.name == "Distillation":
        return losses.DistillationLoss(
            mean=mean,
            length=length,
            divergence=algorithm.divergence or "Reverse",
            teacher="Given" if algorithm.teacher == "Environment" else "Base",
            top_k=algorithm.top_k or TOP_K,
        )
    return losses.PolicyLoss(
        kind="CISPO" if algorithm.name == "CISPO" else "Clip",
        mean=mean,
        length=length,
        ratio=defaults.ratio,
        against=algorithm.old_policy or "Rollout",
        clip_low=defaults.clip_low if algorithm.clip_low is None else algorithm.clip_low,
        clip_high=defaults.clip_high if algorithm.clip_high is None else algorithm.clip_high,
        whiten=algorithm.name not in GROUPED,
        correction=None if algorithm.correction is None else _correction(algorithm.correction),
        kl=None if algorithm.kl is None else _kl(algorithm.kl, algorithm),
    )


def _correction(found: Correction) -> losses.Correction:
    low, high = found.bounds
    return losses.Correction(kind=found.kind, level=found.level, low=low, high=high, veto=found.veto)


def _kl(found: Kl, algorithm: Algorithm) -> losses.Kl:
    return losses.Kl(coefficient=found.coefficient, estimator=found.estimator or algorithm.defaults.kl_estimator)


def refills(algorithm: Algorithm) -> int:
    """Times that prompts are drawn again in place of those that said nothing."""
    return algorithm.defaults.refills if algorithm.refills is None else algorithm.refills


def tells(group: PromptGroup, algorithm: Algorithm) -> bool:
    """Whether a prompt's samples differ in their rewards, where the algorithm compares them."""
    return algorithm.name not in GROUPED or bool(telling(group.rewards))


def rows(groups: Sequence[PromptGroup], algorithm: Algorithm, sampling: Sampling) -> list[TrainRow]:
    """Rows of one member's sampled prompts: of at most promptsPerStep that say something."""
    chosen = [g for g in groups if tells(g, algorithm)][: algorithm.prompts_per_step]
    if algorithm.name == "Distillation":
        return [row for g in chosen for row in _taught(g, algorithm)]
    found = [row for g in chosen for row in _rewarded(g, algorithm, sampling)]
    alike = len({r.advantage for r in found}) <= 1 and algorithm.kl is None
    return [] if alike else found


def _rewarded(group: PromptGroup, algorithm: Algorithm, sampling: Sampling) -> list[TrainRow]:
    rewards = group.rewards
    shape = algorithm.overlong
    if shape is not None or algorithm.defaults.overlong:
        longest = sampling.max_tokens
        cache = min(longest, (shape and shape.cache_tokens) or max(1, longest // 5))
        penalty = 1.0 if shape is None else shape.penalty
        rewards = tuple(
            r + overlong(len(d.ids), longest=longest, cache=cache, penalty=penalty) if usable(r) else r
            for r, d in zip(rewards, group.drawn, strict=True)
        )
    found = ADVANTAGES[algorithm.name](rewards)
    return [
        TrainRow(group.member, group.prompt.ids, d.ids, logprobs=d.logprobs, advantage=advantage)
        for d, advantage in zip(group.drawn, found, strict=True)
        if advantage is not None and d.ids
    ]


def _taught(group: PromptGroup, algorithm: Algorithm) -> list[TrainRow]:
    """What the member answered, with what its teacher goes by; a sample without a lesson is left out."""
    by_environment = algorithm.teacher == "Environment"
    return [
        TrainRow(
            group.member,
            group.prompt.ids,
            d.ids,
            teacher_prompt=None if by_environment else group.prompt.teacher_ids or None,
            teacher_ids=lesson.ids if lesson else None,
            teacher_logprobs=lesson.logprobs if lesson else None,
        )
        for d, lesson in zip(group.drawn, group.lessons or (None,) * len(group.drawn), strict=True)
        if d.ids and (lesson is not None or not by_environment)
    ]
