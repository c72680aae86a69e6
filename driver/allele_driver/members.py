"""Members of a run: what its population's groups and manifests say, and which of them it trains.

Manifests are written by people and by other programs, so a bad row is refused with its row, column, what was expected
and what was found, before anything is started.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from allele.api.population import AdapterPopulationSpec, Group
from allele.api.run import Select, TrainGroup
from allele.protocol.adapters import MEMBER_NAME
from allele.protocol.bundle import RunBundle
from allele.protocol.commands import AdapterSpec
from allele.protocol.initialisation import InitSpec


class InvalidInput(Exception):
    """What the user gave cannot be run; starting again without a change will not help."""


class ManifestError(InvalidInput):
    """One row of a manifest is wrong."""

    def __init__(self, source: Path, *, row: int, column: str, expected: str, found: object) -> None:
        super().__init__(f"{source}: row {row}, column {column}: expected {expected}, found {found!r:.200}")
        self.row = row
        self.column = column


@dataclasses.dataclass(frozen=True)
class Member:
    """One member of a population."""

    name: str
    group: str
    index: int
    """Place in the group, from 0."""
    parameters: Mapping[str, Any]
    """The group's, overridden by the manifest's row."""
    adapter: AdapterSpec
    seed: int
    """Of its initialisation, 63 bits."""


def members_of(group: Group, manifests: Path) -> tuple[Member, ...]:
    """All members of a group. Raises ManifestError, or InvalidInput when the manifest is missing."""
    rows: list[tuple[str, dict[str, Any]]]
    if group.members.manifest is None:
        rows = [(f"{group.name}-{i:04d}", {}) for i in range(group.members.count or 0)]
    else:
        rows = _read_manifest(manifests / group.members.manifest.config_map / group.members.manifest.key)
    adapter = adapter_of(group)
    return tuple(
        Member(
            name=name,
            group=group.name,
            index=i,
            parameters={**group.parameters, **parameters},
            adapter=adapter,
            seed=seed_of(group.seed, name),
        )
        for i, (name, parameters) in enumerate(rows)
    )


def adapter_of(group: Group) -> AdapterSpec:
    """Raises InvalidInput for fields that do not go together: without an API server nobody else has looked."""
    found = group.adapter
    try:
        return AdapterSpec(
            rank=found.rank,
            alpha=found.alpha,
            targets=tuple(found.targets),
            scaling=found.scaling,
            init=InitSpec(kind=found.init.kind, base_mode=found.init.base_mode),
        )
    except ValidationError as e:
        raise InvalidInput(f"groups.{group.name}.adapter: {e.errors()[0]['msg']}") from e


def seed_of(*parts: object) -> int:
    """63 bits that depend on every part; the same on every machine."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _read_manifest(source: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise InvalidInput(f"{source}: expected a manifest of members, found none: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise InvalidInput(f"{source}: expected UTF-8, found byte {e.object[e.start]:#x} at {e.start}") from e
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, parameters = _row(source, number, line)
            if name in rows:
                raise ManifestError(source, row=number, column="name", expected="a name not used before", found=name)
            rows[name] = parameters
    if not rows:
        raise InvalidInput(f"{source}: expected at least one row, found none")
    return list(rows.items())


def _row(source: Path, number: int, line: str) -> tuple[str, dict[str, Any]]:
    def refuse(column: str, expected: str, found: object) -> ManifestError:
        return ManifestError(source, row=number, column=column, expected=expected, found=found)

    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise refuse(str(e.colno), f"one JSON object ({e.msg})", line) from e
    if not isinstance(row, dict):
        raise refuse("1", 'an object {"name": …, "parameters": {…}}', row)
    unknown = sorted(row.keys() - {"name", "parameters"})
    if unknown:
        raise refuse(unknown[0], "only the columns name and parameters", row[unknown[0]])
    name, parameters = row.get("name"), row.get("parameters", {})
    if not isinstance(name, str) or not MEMBER_NAME.fullmatch(name):
        raise refuse("name", "1 to 63 of A-Z a-z 0-9 . _ -, letters or digits at both ends", name)
    if not isinstance(parameters, dict):
        raise refuse("parameters", "an object", parameters)
    return name, parameters


def select(members: Sequence[Member], chosen: Select) -> tuple[Member, ...]:
    """The part of a group that `chosen` names. Raises InvalidInput for what the group does not have."""
    if chosen.names is not None:
        known = {m.name: m for m in members}
        for name in chosen.names:
            if name not in known:
                raise InvalidInput(f"select.names: expected members of group {chosen.group!r}, found {name!r}")
        return tuple(known[name] for name in chosen.names)
    if chosen.range is None:
        return tuple(members)
    first, count = chosen.range.first, chosen.range.count
    if first + count > len(members):
        raise InvalidInput(
            f"select.range: expected at most {len(members)} members in group {chosen.group!r}, found {first}+{count}"
        )
    return tuple(members[first : first + count])


@dataclasses.dataclass(frozen=True)
class Part:
    """Members of a run that are trained the same way: one entry of its spec.groups."""

    spec: TrainGroup
    members: tuple[Member, ...]


def parts_of(bundle: RunBundle, manifests: Path) -> tuple[Part, ...]:
    """What a run trains. Raises InvalidInput when a group is missing, or a member is chosen twice."""
    groups = {g.name: g for g in bundle.population_spec.groups}
    parts: list[Part] = []
    seen: dict[str, int] = {}
    for number, spec in enumerate(bundle.run_spec.groups):
        group = groups.get(spec.select.group)
        if group is None:
            raise InvalidInput(
                f"groups[{number}].select.group: expected one of {sorted(groups)} of population {bundle.population!r}, "
                f"found {spec.select.group!r}"
            )
        part = Part(spec, select(members_of(group, manifests), spec.select))
        for member in part.members:
            if member.name in seen:
                raise InvalidInput(
                    f"groups[{number}].select: expected members in one group of the run, found {member.name!r} "
                    f"in groups[{seen[member.name]}] too"
                )
            seen[member.name] = number
        parts.append(part)
    _unique_across_groups(bundle.population_spec, manifests)
    return tuple(parts)


def _unique_across_groups(population: AdapterPopulationSpec, manifests: Path) -> None:
    """A member's name is its key in the store, so two groups may not both have it."""
    seen: dict[str, str] = {}
    for group in population.groups:
        for member in members_of(group, manifests):
            if seen.setdefault(member.name, group.name) != group.name:
                raise InvalidInput(
                    f"groups: expected each member in one group, found {member.name!r} in "
                    f"{seen[member.name]!r} and {group.name!r}"
                )
