"""What a step leaves in the store: provenance by part, and the facts of its commit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime

import allele
from allele.protocol.bundle import RunBundle
from allele.protocol.commands import TrainerSetting
from allele.store import BaseRef, DataRange, Fact, Index, Provenance, SamplingRef, ShapeRef, Versions
from allele_driver.algorithms import loss_spec
from allele_driver.exposure import gate_of
from allele_driver.loop.resume import optimizer_spec
from allele_driver.loop.rollout import ActivePart
from allele_driver.loop.setup import Base
from allele_driver.loop.train import Exported, Trained, Turn
from allele_driver.members import Member
from allele_driver.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is the same for all commits of one start of the driver."""

    bundle: RunBundle
    fence: int
    base: Base
    sglang: str
    """Version of the engines."""


def provenance(
    origin: Origin,
    active: ActivePart,
    *,
    setting: TrainerSetting | None,
    step: int,
    shape: str,
    factors: str,
    members: Collection[str],
    prompts: int,
    lags: Mapping[int, int],
    seconds: Mapping[str, float],
) -> Provenance:
    """Of the revisions of `members` that one part of the run made in a step. The cursor is the step: prompts follow."""
    bundle, adapter = origin.bundle, active.part.members[0].adapter
    return Provenance(
        namespace=bundle.namespace,
        population=bundle.population,
        population_uid=bundle.population_uid,
        run=bundle.run,
        run_uid=bundle.run_uid,
        fence=origin.fence,
        step=step,
        run_generation=bundle.run_generation,
        population_generation=bundle.population_generation,
        base=BaseRef(uri=bundle.base_uri, digest=bundle.population_spec.base.digest),
        tokenizer_digest=origin.base.tokenizer.digest,
        chat_template_digest=origin.base.chat_template_digest,
        shapes={
            active.spec.select.group: ShapeRef(
                digest=shape,
                rank=adapter.rank,
                alpha=adapter.alpha,
                scaling=adapter.scaling,
                targets=adapter.targets,
                init=adapter.init.kind,
                base_mode=adapter.init.base_mode,
                factors=factors,
                seed=next(g.seed for g in bundle.population_spec.groups if g.name == active.spec.select.group),
                residual_of=origin.base.residual.source_digest if origin.base.residual else "",
            )
        },
        environment=active.spec.environment.path,
        environment_parameters=active.spec.environment.parameters,
        reward=f"{active.spec.environment.path}.score",
        code_digest=active.scorer.code_digest,
        data=DataRange(cursor=step, prompts=prompts, digest=active.scorer.data_digest),
        sampling=_sampling(origin, active),
        policy_lag=dict(lags),
        image=bundle.image,
        trainer=setting,
        versions=Versions(allele=allele.__version__, sglang=origin.sglang),
        optimizer=optimizer_spec(active.spec.optimizer),
        loss={
            **loss_spec(active.spec.algorithm, active.spec.sampling).model_dump(),
            "algorithm": active.spec.algorithm.model_dump(exclude_none=True),
            "learning_rate": active.spec.optimizer.learning_rate,
            "schedule": active.spec.optimizer.schedule,
            "overrides": _overrides(active, members),
        },
        probes=active.probes,
        gate=gate_of(bundle),
        seconds=dict(seconds),
        time=datetime.now(UTC),
    )


def _sampling(origin: Origin, active: ActivePart) -> SamplingRef | None:
    if active.reads:
        return None
    return SamplingRef(**active.spec.sampling.model_dump(), stop_token_ids=origin.base.tokenizer.stop_token_ids)


def _overrides(active: ActivePart, members: Collection[str]) -> dict[str, object]:
    """Member → the algorithm and optimizer that are its own."""
    usual = (active.spec.algorithm, active.spec.optimizer)
    own = {m: active.recipes[m] for m in members}
    return {
        m: {"algorithm": r.algorithm.model_dump(exclude_none=True), "optimizer": r.optimizer.model_dump()}
        for m, r in own.items()
        if (r.algorithm, r.optimizer) != usual
    }


def committed(
    member: Member,
    exported: Exported,
    *,
    index: Index,
    parent: int | None,
    provenance: str,
    metrics: Mapping[str, float],
) -> Fact:
    """The fact that makes a revision exist."""
    return Fact.committed(
        member=member.name,
        revision=index.next_revision(member.name),
        weights=exported.weights,
        state=exported.state,
        group=member.group,
        parent=parent,
        probe=exported.probe or None,
        metrics=metrics,
        provenance=provenance,
        shape=exported.shape,
    )


OWN_STEP = "own_step"
"""Key in the metrics of facts: optimizer steps of this run that the member has had."""


def step_metrics(turn: Turn, trained: Trained, rollouts: Rollouts, *, lag: int) -> dict[str, float]:
    """Numbers of one member's step that go into its fact; what its loss does not have is left out."""
    rewards = [r for g in rollouts.of(turn.member) for r in g.kept_rewards()]
    loss = trained.loss.model_dump(exclude_none=True)
    reward = {"reward": sum(rewards) / len(rewards)} if rewards else {}
    return {
        **reward,
        "samples": float(len(rewards)),
        "trained_samples": float(len(turn.rows)),
        "dropped_samples": float(sum(rollouts.dropped.get(turn.member, {}).values())),
        **{name: float(value) for name, value in loss.items()},
        "grad_norm": trained.update.grad_norm,
        "optimizer_step": float(trained.update.step),
        OWN_STEP: float(turn.own_step),
        "learning_rate": turn.learning_rate,
        "policy_lag": float(lag),
        "batched": float(trained.mode == "Batched"),
    }


def lag_of(sampled: int | None, current: int | None, member: str, index: Index) -> int:
    """Revisions between the one that was sampled and the one that is trained."""
    lag = 0
    while current is not None and current != sampled:
        fact = index.get(member, current)
        current = fact.parent if fact is not None else None
        lag += 1
    return lag


def lags(rollouts: Rollouts, current: Mapping[str, int], index: Index) -> dict[str, Counter[int]]:
    """Member → lag → samples."""
    found: dict[str, Counter[int]] = {}
    for g in rollouts.groups:
        lag = lag_of(g.revision, current.get(g.member), g.member, index)
        found.setdefault(g.member, Counter())[lag] += len(g.drawn)
    for member, rows in rollouts.given.items():
        found.setdefault(member, Counter())[0] += len(rows)
    return found


def total(lags: Iterable[Counter[int]]) -> Counter[int]:
    """Lag → samples of several members."""
    found: Counter[int] = Counter()
    for lag in lags:
        found += lag
    return found
