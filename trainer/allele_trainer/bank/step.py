"""One optimizer step of many rows: AdamW (arXiv:1711.05101), each row with its own rate, rule, clip and step count.

Norms of all rows come first and go to the host together. A row whose norm is not finite is left as it was. A row whose
norm is above its clip has its gradient divided by norm / clip, as `clip_grad_norm_` does; then torch's fused kernel
runs once for all rows that share rate and rule. Every operation is element by element within a row, so a row's bits do
not depend on which other rows step with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from allele.protocol.commands import OptimizerSpec
from allele_trainer.bank.pieces import Pieces, complement, overlap
from allele_trainer.bank.rows import Bank
from allele_trainer.bank.shard import Shard
from allele_trainer.parallel import Ranks


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    slot: int
    learning_rate: float
    optimizer: OptimizerSpec
    frozen: tuple[slice, ...] = ()
    """Parts of the row without gradient, decay or moments; in the norm they do not count."""


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
    trained = [_trained(bank.numel, u.frozen) for u in updates]
    _sum_over_ranks(bank, updates, ranks)
    norms = _norms(bank, updates, trained, ranks)
    moving = [i for i, norm in enumerate(norms) if math.isfinite(norm)]
    first = [i for i in moving if bank.steps[updates[i].slot] == 0 and norms[i] > 0 and updates[i].learning_rate > 0]
    before = {i: bank.weights(updates[i].slot).clone() for i in first}
    for group in _by_rule(updates, moving).values():
        _apply(bank, updates, trained, norms, group)
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
    """By rate and rule; equal rules that are not one object only cost a kernel more."""
    groups: dict[object, list[int]] = {}
    for i in indices:
        groups.setdefault((updates[i].learning_rate, id(updates[i].optimizer)), []).append(i)
    return groups


def _apply(
    bank: Bank, updates: Sequence[Update], trained: Sequence[Pieces], norms: Sequence[float], group: Sequence[int]
) -> None:
    """One kernel for all rows of a group: same rate and rule, each its own clip and step count."""
    rule = updates[group[0]].optimizer
    clipped = [i for i in group if norms[i] + 1e-6 > rule.clip]
    if clipped:
        torch._foreach_div_(
            [bank.gradient(updates[i].slot) for i in clipped], [(norms[i] + 1e-6) / rule.clip for i in clipped]
        )
    torch._foreach_add_([bank.step_views[updates[i].slot] for i in group], 1)
    weights, gradients, exp_avgs, exp_avg_sqs, counts = [], [], [], [], []
    for i in group:
        slot, whole = updates[i].slot, not updates[i].frozen
        row = bank.gradient(slot), *(views[slot] for views in bank.rows)
        for piece in trained[i]:
            g, w, m, v = row if whole else (part[piece] for part in row)
            weights.append(w)
            gradients.append(g)
            exp_avgs.append(m)
            exp_avg_sqs.append(v)
            counts.append(bank.step_views[slot])
    torch._fused_adamw_(
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        counts,
        lr=updates[group[0]].learning_rate,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=rule.weight_decay,
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


def _norms(bank: Bank, updates: Sequence[Update], trained: Sequence[Pieces], ranks: Ranks) -> list[float]:
    """Of the gradients of whole members, whatever this rank holds of them."""
    dense, experts = _counted(bank.shard)
    squares = _squares(bank, updates, [overlap(dense, pieces) for pieces in trained])
    of_experts = _squares(bank, updates, [overlap(experts, pieces) for pieces in trained]) if experts else None
    norms: list[float] = ranks.sum_squares(squares, of_experts).sqrt().tolist()
    return norms


def _squares(bank: Bank, updates: Sequence[Update], counted: Sequence[Pieces]) -> Tensor:
    """`[n]` sums of squares of some pieces of each gradient, in double precision: a square overflows in single."""
    owners = [i for i, pieces in enumerate(counted) for _ in pieces]
    parts = [
        bank.gradient(u.slot) if piece == slice(0, bank.numel) else bank.gradient(u.slot)[piece]
        for u, pieces in zip(updates, counted, strict=True)
        for piece in pieces
    ]
    total = torch.zeros(len(updates), dtype=torch.float64, device=bank.device)
    if parts:
        squares = torch.stack(torch._foreach_norm(parts)).double().square()
        total.index_add_(0, torch.tensor(owners, device=bank.device), squares)
    return total


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


def _trained(numel: int, frozen: tuple[slice, ...]) -> Pieces:
    return _without(numel, tuple((s.start, s.stop) for s in frozen)) if frozen else (slice(0, numel),)


@functools.lru_cache(maxsize=256)
def _without(numel: int, frozen: tuple[tuple[int, int], ...]) -> Pieces:
    return complement([slice(*ends) for ends in frozen], numel)
