"""Which members a run trains, and whether two runs would train the same one.

Members of a group by count have an index and a name that tell each other; those of a manifest do not without the
file, which the operator does not read. Where it cannot tell, it takes two selections of a group to overlap.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from allele.api.population import AdapterPopulationSpec, Group
from allele.api.run import RLRunSpec, Select


@dataclasses.dataclass(frozen=True)
class Part:
    """A selection of one group: all of it, members by index [first, end), or members by name."""

    group: str
    span: tuple[int, int] | None = None
    names: frozenset[str] | None = None
    counted: bool = False
    """Whether the group's members are named by their index."""

    @property
    def whole(self) -> bool:
        return self.span is None and self.names is None


def parts(run: RLRunSpec, population: AdapterPopulationSpec | None) -> list[Part]:
    counted = {g.name for g in population.groups if g.members.count is not None} if population else set()
    return [_part(g.select, counted=g.select.group in counted) for g in run.groups]


def _part(select: Select, *, counted: bool) -> Part:
    span = (select.range.first, select.range.first + select.range.count) if select.range else None
    names = frozenset(select.names) if select.names is not None else None
    return Part(select.group, span, names, counted)


def overlap(one: Sequence[Part], other: Sequence[Part]) -> str | None:
    """Name of a group of which both train the same member."""
    return next((a.group for a in one for b in other if _meet(a, b)), None)


def _meet(a: Part, b: Part) -> bool:
    if a.group != b.group:
        return False
    if a.whole or b.whole:
        return True
    if a.span and b.span:
        return a.span[0] < b.span[1] and b.span[0] < a.span[1]
    if a.names is not None and b.names is not None:
        return bool(a.names & b.names)
    span, names = (a.span or b.span or (0, 0)), (a.names or b.names or frozenset())
    if not (a.counted and b.counted):
        return True
    return any(span[0] <= (index(a.group, name) or 0) < span[1] for name in names)


def index(group: str, name: str) -> int | None:
    """Index of a member of a group by count: `<group>-0007` is 7."""
    match = re.fullmatch(re.escape(group) + r"-(\d{4,})", name)
    return int(match[1]) if match else None


def size(run: RLRunSpec, population: AdapterPopulationSpec) -> int | None:
    """Members that the run trains; None when a manifest decides."""
    counts = {g.name: g.members.count for g in population.groups}
    sizes = [_size(g.select, counts.get(g.select.group)) for g in run.groups]
    return None if None in sizes else sum(s for s in sizes if s is not None)


def _size(select: Select, count: int | None) -> int | None:
    if select.names is not None:
        return len(select.names)
    return select.range.count if select.range else count


def problem(run: RLRunSpec, population: AdapterPopulationSpec) -> str | None:
    """Why the population does not have what the run selects: field, expected and found."""
    groups = {g.name: g for g in population.groups}
    selected = parts(run, population)
    for i, train in enumerate(run.groups):
        at, select = f"spec.groups[{i}].select", train.select
        group = groups.get(select.group)
        if group is None:
            return f"{at}.group: expected one of {', '.join(groups)}, found {select.group}"
        if group.members.count is not None and (wrong := _outside(select, group, group.members.count)):
            return f"{at}{wrong}"
        if name := overlap([selected[i]], selected[:i]):
            return f"{at}: members of group {name} are selected twice by this run"
    return None


def _outside(select: Select, group: Group, count: int) -> str | None:
    if select.range and select.range.first + select.range.count > count:
        last = select.range.first + select.range.count - 1
        return f".range: expected indices below {count} (members of group {group.name}), found {last}"
    for name in select.names or ():
        at = index(group.name, name)
        if at is None or at >= count:
            return f".names: expected {group.name}-0000 to {group.name}-{count - 1:04d}, found {name}"
    return None
