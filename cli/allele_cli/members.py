"""`allele members`: who there is, and what each is now."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import typer

from allele.store.index import Index
from allele_cli.access import NamespaceOption, PopulationArgument, StoreOption, open_population
from allele_cli.output import Format, FormatOption, show


class Sort(enum.StrEnum):
    member = "member"
    reward = "reward"
    step = "step"
    updated = "updated"


def members(
    population: PopulationArgument,
    sort: Annotated[Sort, typer.Option(help="By what; all but member: the highest first, those without last.")] = (
        Sort.member
    ),
    limit: Annotated[int | None, typer.Option(help="Rows at most.", min=1)] = None,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
    output: FormatOption = Format.table,
) -> None:
    """Every member with its newest and exposed revision, its hold and its pins.

    Example: `allele members preferences --namespace allele-demo --sort reward --limit 10`
    """
    index = Index.load(open_population(population, namespace=namespace, store=store).catalogue)
    names = sorted(index.members())
    if sort is Sort.member:
        names = names[:limit]
    rows = [_row(index, name) for name in names]
    if sort is not Sort.member:
        rows = sorted(rows, key=lambda r: (r[sort] is not None, r[sort]), reverse=True)[:limit]
    show(rows, fmt=output)


def _row(index: Index, member: str) -> dict[str, Any]:
    newest, exposed, hold = index.newest(member), index.exposed(member), index.hold(member)
    pins = [r for r in range(1, index.next_revision(member)) if index.is_pinned(member, r)]
    return {
        "member": member,
        "group": newest.group if newest else None,
        "newest": newest and newest.revision,
        "exposed": exposed and exposed.revision,
        "held": hold and hold.revision,
        "pinned": " ".join(map(str, pins)) or None,
        "step": newest and newest.step,
        "reward": newest.metrics.get("reward") if newest else None,
        "digest": newest.digest[:12] if newest and newest.digest else None,
        "updated": newest.time.strftime("%Y-%m-%d %H:%M:%S") if newest and newest.time else None,
    }
