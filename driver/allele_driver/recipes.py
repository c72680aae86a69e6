"""How each member of a part is trained: the part's algorithm and optimizer with what the member's parameters override.

A member's `parameters.algorithm` and `parameters.optimizer` are written as in the run's spec. What is sampled is the
same for all members of a part, so the fields that say it cannot be overridden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from allele.api.algorithm import Algorithm, unfit
from allele.api.run import Optimizer, TrainGroup
from allele.api.schema import Model
from allele_driver.environments import MemberView
from allele_driver.members import InvalidInput, Member

OVERRIDES = ("algorithm", "optimizer")
"""Parameters of a member that its environment does not see."""

SHARED = ("name", "promptsPerStep", "groupSize", "refills", "teacher", "topK")
"""Fields of an algorithm that say what is sampled."""

M = TypeVar("M", bound=Model)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Of one member, or of all that override nothing."""

    algorithm: Algorithm
    optimizer: Optimizer


def recipes(spec: TrainGroup, members: Sequence[Member]) -> dict[str, Recipe]:
    """By member. Raises InvalidInput naming member and field for what cannot be."""
    usual = Recipe(spec.algorithm, spec.optimizer)
    _check(usual, where=f"group {spec.select.group}")
    return {m.name: _own(usual, m) for m in members}


def _own(usual: Recipe, member: Member) -> Recipe:
    changes = {key: member.parameters[key] for key in OVERRIDES if key in member.parameters}
    if not changes:
        return usual
    for key, value in changes.items():
        if not isinstance(value, Mapping):
            raise InvalidInput(f"member {member.name}, parameters.{key}: expected an object, found {value!r:.200}")
    shared = sorted(changes.get("algorithm", {}).keys() & set(SHARED))
    if shared:
        raise InvalidInput(
            f"member {member.name}, parameters.algorithm.{shared[0]}: expected the run's own (members of a part are "
            f"sampled alike), found {changes['algorithm'][shared[0]]!r:.200}"
        )
    recipe = Recipe(
        _with(usual.algorithm, changes.get("algorithm", {}), where=f"member {member.name}, parameters.algorithm"),
        _with(usual.optimizer, changes.get("optimizer", {}), where=f"member {member.name}, parameters.optimizer"),
    )
    _check(recipe, where=f"member {member.name}")
    return recipe


def _with(spec: M, changes: Mapping[str, Any], *, where: str) -> M:
    """A copy with other values; a name that the spec does not have is refused."""
    known = {to_camel(f) for f in type(spec).model_fields}
    unknown = sorted(changes.keys() - known)
    if unknown:
        raise InvalidInput(f"{where}: expected fields out of {sorted(known)}, found {unknown[0]!r}")
    try:
        return type(spec).model_validate({**spec.model_dump(by_alias=True, exclude_none=True), **changes})
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        raise InvalidInput(f"{where}.{field}: {first['msg']}, found {first['input']!r:.200}") from e


def _check(recipe: Recipe, *, where: str) -> None:
    wrong = unfit(recipe.algorithm)
    if wrong is not None:
        raise InvalidInput(f"{where}, algorithm: {wrong}")
    optimizer = recipe.optimizer
    if optimizer.horizon is not None and optimizer.warmup_steps >= optimizer.horizon:
        raise InvalidInput(
            f"{where}, optimizer.warmupSteps: expected less than horizon ({optimizer.horizon}), found "
            f"{optimizer.warmup_steps}"
        )


def view(member: Member) -> MemberView:
    """What an environment sees of a member: not what is meant for the trainer."""
    parameters = {k: v for k, v in member.parameters.items() if k not in OVERRIDES}
    return MemberView(member.name, member.group, member.index, parameters)
