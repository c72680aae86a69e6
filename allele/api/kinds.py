"""The kinds: names, short names, columns of `kubectl get`, and rules that bind the name to what is made from it.

Columns answer "is it well, and if not, why" at priority 0 and give the sentence with `-o wide`. A root rule sees only
metadata.name, spec and status, and its error has no path, so the message names the field.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import BaseModel

from allele.api.pool import BasePoolSpec, BasePoolStatus
from allele.api.population import AdapterPopulationSpec, AdapterPopulationStatus
from allele.api.run import RLRunSpec, RLRunStatus
from allele.api.runtime import AdapterRuntimeSpec, AdapterRuntimeStatus
from allele.api.schema import cel
from allele.api.store import AdapterStoreSpec, AdapterStoreStatus


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of `kubectl get`; priority 1 is shown by `-o wide` only."""

    name: str
    type: str
    path: str
    description: str
    priority: int = 0


@dataclasses.dataclass(frozen=True)
class Kind:
    kind: str
    plural: str
    short: str
    spec: type[BaseModel]
    status: type[BaseModel]
    description: str
    columns: tuple[Column, ...]
    rules: tuple[dict[str, Any], ...] = ()
    scale: dict[str, str] | None = None


def _explained(condition: str, *, status: bool = True) -> tuple[Column, ...]:
    """Columns of the condition that sums up the object."""
    path = f'.status.conditions[?(@.type=="{condition}")].'
    reason = Column("Reason", "string", path + "reason", f"Why {condition} is what it is.")
    return (Column(condition, "string", path + "status", f"Condition {condition}."), reason) if status else (reason,)


def _message(condition: str) -> Column:
    path = f'.status.conditions[?(@.type=="{condition}")].message'
    return Column("Message", "string", path, f"The sentence of condition {condition}.", 1)


def _status(name: str, path: str, description: str, *, type_: str = "integer", priority: int = 0) -> Column:
    return Column(name, type_, ".status." + path, description, priority)


def _name(limit: int, why: str) -> tuple[dict[str, Any], ...]:
    label = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
    return (
        cel(
            f"self.metadata.name.matches('{label}')",
            "metadata.name must begin with a letter and hold only a-z, 0-9 and -",
        ),
        cel(f"size(self.metadata.name) <= {limit}", f"metadata.name must be at most {limit} characters, {why}"),
    )


STORE = Kind(
    "AdapterStore",
    "adapterstores",
    "ast",
    AdapterStoreSpec,
    AdapterStoreStatus,
    "A bucket that holds adapters: the truth about them, whatever happens to pods.",
    (*_explained("Reachable"), _status("URL", "url", "Where adapters lie.", type_="string"), _message("Reachable")),
    _name(40, "so that the names of its probe Jobs fit"),
)
RUNTIME = Kind(
    "AdapterRuntime",
    "adapterruntimes",
    "art",
    AdapterRuntimeSpec,
    AdapterRuntimeStatus,
    "The platform team's part of a pool: images, sizes, pod pieces, engine arguments.",
    (
        *_explained("Valid"),
        Column("Engine", "string", ".spec.images.engine", "Image of the engine.", 1),
        _message("Valid"),
    ),
    _name(63, "so that it fits in a label"),
)
POOL = Kind(
    "BasePool",
    "basepools",
    "bp",
    BasePoolSpec,
    BasePoolStatus,
    "One base model kept resident, by a trainer and rollouts that many runs and populations share.",
    (
        *_explained("Ready"),
        _status("Used", "slots.used", "Training slots in use."),
        _status("Slots", "slots.total", "Training slots."),
        _status("Rollouts", "replicas", "Ready rollout pods."),
        _status("Publish", "publishPath", "How new revisions get into engines.", type_="string"),
        _status("Runs", "runs", "Runs that train here now."),
        _status("Endpoint", "endpoint", "OpenAI-compatible URL.", type_="string", priority=1),
        _message("Ready"),
    ),
    _name(32, "so that the names of its pods fit in 63"),
    {
        "specReplicasPath": ".spec.rollout.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    },
)
POPULATION = Kind(
    "AdapterPopulation",
    "adapterpopulations",
    "apop",
    AdapterPopulationSpec,
    AdapterPopulationStatus,
    "Groups of members that share a base, each member an adapter of its own.",
    (
        *_explained("Ready"),
        _status("Members", "members.total", "Members declared."),
        _status("Trained", "members.trained", "Members with a committed revision."),
        _status("Failed", "members.failed", "Members that stopped with an error."),
        _status("Revisions", "revisions.committed", "Revisions committed by runs."),
        _status("Exposed", "revisions.exposed", "Exposures by runs.", priority=1),
        _message("Ready"),
    ),
    _name(63, "so that it fits in a label and in models' names"),
)
RUN = Kind(
    "RLRun",
    "rlruns",
    "rlr",
    RLRunSpec,
    RLRunStatus,
    "Reinforcement learning of some members of a population, in a pool.",
    (
        _status("Phase", "phase", "Display only.", type_="string"),
        *_explained("Running", status=False),
        _status("Step", "progress.step", "Last committed step."),
        _status("Steps", "progress.steps", "Steps in all."),
        _status("Reward", "reward.mean", "Mean reward of the last step.", type_="string"),
        _status("Members", "members", "Members that it trains."),
        _status("Trained", "trained", "Members with a revision of this run.", priority=1),
        _status("Lag", "policyLag", "Largest policy lag of the last step.", priority=1),
        _status("ETA", "progress.etaSeconds", "Estimated seconds left.", priority=1),
        _message("Running"),
    ),
    (
        *_name(40, "so that the names of its Job and ConfigMap fit"),
        cel(
            "!has(self.spec.runtimeRef) || size(self.metadata.name) <= 27",
            "metadata.name must be at most 27 characters with runtimeRef, so that the names of its pool's pods fit",
        ),
    ),
)
KINDS = (STORE, RUNTIME, POOL, POPULATION, RUN)
