"""One optimizer step of many rows: AdamW (arXiv:1711.05101), each row with its own rate, rule, clip and step count.

Norms of all rows come first and go to the host together. A row whose norm is not finite is left as it was. A row whose
norm is above its clip has its gradient divided by norm / clip, as `clip_grad_norm_` does; then torch's fused kernel
runs once for all rows that share rate and rule. Every operation is element by element within a row, so a row's bits do
not depend on which other rows step with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from allele.protocol.commands import OptimizerSpec
from allele_trainer.bank.rows import Bank
from allele_trainer.bank.shard import Shard
from allele_trainer.parallel import Ranks

Pieces = tuple[slice, ...]
"""Ascending slices of a row that do not overlap."""


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    slot: int
    learning_rate: float
    optimizer: OptimizerSpec
    trained: Tensor | None = None
    """`[P]` of ones and zeros: where it is zero there is no gradient, decay or moment, and nothing counts in the norm.
    None: all of the row trains, at no cost."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stepped:
    step: int
    norm: float
    skipped: bool
    moved: bool
    """False when the row's first step, at a rate above zero with a gradient that is not zero, left its weights as they
    were: the step did not reach what is trained."""


def step(bank: Bank, updates: Sequence[Update], *, ranks: Ranks) -> list[Stepped]:
    """Step the rows named and drop their gradients. All ranks call it with the same updates."""
    if not updates:
        return []
    _sum_over_ranks(bank, updates, ranks)
    _mask(bank, updates)
    norms = _norms(bank, updates, ranks)
    moving = [i for i, norm in enumerate(norms) if math.isfinite(norm)]
    first = [i for i in moving if bank.steps[updates[i].slot] == 0 and norms[i] > 0 and updates[i].learning_rate > 0]
    before = {i: bank.weights(updates[i].slot).clone() for i in first}
    for group in _by_rule(updates, moving).values():
        _apply(bank, updates, norms, group)
    bank.refresh([updates[i].slot for i in moving])
    for i in moving:
        bank.steps[updates[i].slot] += 1
    still = _still(bank, updates, before, ranks)
    for update in updates:
        bank.drop_gradient(update.slot)
    return [
        Stepped(step=bank.steps[u.slot], norm=norm, skipped=not math.isfinite(norm), moved=i not in still)
        for i, (u, norm) in enumerate(zip(updates, norms, strict=True))
    ]


def _by_rule(updates: Sequence[Update], indices: Iterable[int]) -> Mapping[object, list[int]]:
    """By rate, rule and whether a part is frozen; equal rules that are not one object only cost a kernel more."""
    groups: dict[object, list[int]] = {}
    for i in indices:
        u = updates[i]
        groups.setdefault((u.learning_rate, id(u.optimizer), u.trained is None), []).append(i)
    return groups


def _mask(bank: Bank, updates: Sequence[Update]) -> None:
    """Take the gradients of what is frozen away; one that is not finite stays so, and its row is skipped."""
    masked = [(bank.gradient(u.slot), u.trained) for u in updates if u.trained is not None]
    if masked:
        torch._foreach_mul_([g for g, _ in masked], [m for _, m in masked])


def _decay(bank: Bank, updates: Sequence[Update], group: Sequence[int]) -> float:
    """Weight decay that is left to the kernel: all of it, unless parts of these rows are frozen. Then it is done here,
    as the kernel would: before the step, by rate times decay."""
    rate, decay = updates[group[0]].learning_rate, updates[group[0]].optimizer.weight_decay
    masks = [m for i in group if (m := updates[i].trained) is not None]
    if not masks or not decay:
        return decay
    weights = [bank.weights(updates[i].slot) for i in group]
    torch._foreach_addcmul_(weights, weights, masks, value=-rate * decay)
    return 0.0


def _apply(bank: Bank, updates: Sequence[Update], norms: Sequence[float], group: Sequence[int]) -> None:
    """One kernel for all rows of a group: same rate and rule, each its own clip and step count."""
    rule = updates[group[0]].optimizer
    clipped = [i for i in group if norms[i] + 1e-6 > rule.clip]
    if clipped:
        torch._foreach_div_(
            [bank.gradient(updates[i].slot) for i in clipped], [(norms[i] + 1e-6) / rule.clip for i in clipped]
        )
    torch._foreach_add_([bank.step_views[updates[i].slot] for i in group], 1)
    slots = [updates[i].slot for i in group]
    weight_decay = _decay(bank, updates, group)
    weights, exp_avgs, exp_avg_sqs = ([views[s] for s in slots] for views in bank.rows)
    torch._fused_adamw_(
        weights,
        [bank.gradient(s) for s in slots],
        exp_avgs,
        exp_avg_sqs,
        [],
        [bank.step_views[s] for s in slots],
        lr=updates[group[0]].learning_rate,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=weight_decay,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )


def _sum_over_ranks(bank: Bank, updates: Sequence[Update], ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    rows = [bank.gradient_row(u.slot) for u in updates]
    gradients = bank.gradients_of(rows)
    ranks.sum_gradients(gradients, bank.shard)
    for u, gradient in zip(updates, gradients, strict=True):
        if bank.gradient(u.slot).data_ptr() != gradient.data_ptr():
            bank.gradient(u.slot).copy_(gradient)


def _norms(bank: Bank, updates: Sequence[Update], ranks: Ranks) -> list[float]:
    """Of the gradients of whole members, whatever this rank holds of them."""
    dense, experts = _counted(bank.shard)
    squares = _squares(bank, updates, dense)
    of_experts = _squares(bank, updates, experts) if experts else None
    norms: list[float] = ranks.sum_squares(squares, of_experts).sqrt().tolist()
    return norms


def _squares(bank: Bank, updates: Sequence[Update], counted: Pieces) -> Tensor:
    """`[n]` sums of squares of some pieces of each gradient, in double precision: a square overflows in single."""
    whole = slice(0, bank.numel)
    parts = [
        bank.gradient(u.slot) if piece == whole else bank.gradient(u.slot)[piece] for u in updates for piece in counted
    ]
    if not parts:
        return torch.zeros(len(updates), dtype=torch.float64, device=bank.device)
    squares = torch.stack(torch._foreach_norm(parts)).double().square()
    return squares if len(counted) == 1 else squares.view(len(updates), -1).sum(1)


def _still(bank: Bank, updates: Sequence[Update], before: Mapping[int, Tensor], ranks: Ranks) -> set[int]:
    """Which of the rows in `before` have the same weights on every rank."""
    if not before:
        return set()
    moved = torch.stack([(bank.weights(updates[i].slot) != row).any() for i, row in before.items()]).double()
    if ranks.size > 1:
        moved = ranks.sum_squares(moved, moved if bank.shard.experts else None)
    return {i for i, change in zip(before, moved.tolist(), strict=True) if not change}


def _counted(shard: Shard) -> tuple[Pieces, Pieces]:
    """What of a local row counts towards the norm of the whole: (without experts, experts)."""
    if shard.whole:
        return (slice(0, shard.numel),), ()
    return shard.counted, shard.experts
