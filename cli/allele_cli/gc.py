"""`allele gc`: what of a population, or of a namespace's folders, nobody needs, and why."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Any

import typer

from allele.api.population import Retention
from allele.protocol.errors import InvalidRequest
from allele.store.collect import collect, survey
from allele.store.errors import OwnershipError
from allele.store.facts import Fact, now
from allele.store.objects import Objects
from allele.store.population import PopulationStore
from allele.store.retention import Plan, Policy
from allele_cli.access import NamespaceOption, StoreOption, get, listed, open_population, stores_of
from allele_cli.bar import Bar
from allele_cli.failure import Failure
from allele_cli.output import Format, FormatOption, show
from allele_cli.stores import folders
from allele_operator.planning.collection import kept


def gc(
    population: Annotated[str | None, typer.Argument(help="Name of the population; absent with --orphans.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and why.")] = False,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Only list folders that no population owns; nothing is deleted.")
    ] = False,
    grace: Annotated[
        float | None, typer.Option(help="Hours that bytes stay after they are no longer needed; default 24.", min=0)
    ] = None,
    keep_last: Annotated[int | None, typer.Option(help="Newest revisions of each member; default 5.", min=1)] = None,
    every: Annotated[int | None, typer.Option(help="Also every n-th revision; 0: none, the default.", min=0)] = None,
    max_policy_lag: Annotated[
        int | None, typer.Option(help="Largest of the population's runs; default 1.", min=0)
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="Uid of a run that may go on: what it resumes from stays; repeatable.")
    ] = None,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
    output: FormatOption = Format.table,
) -> None:
    """Retire what retention does not keep, compact what is mostly gone, and delete what went a grace period ago.

    Exposed, held, pinned and resumable revisions always stay. Without --store, defaults come from the population's
    spec.retention and from its unfinished runs.

    Example: `allele gc preferences --dry-run --keep-last 3 --namespace allele-demo`
    """
    if orphans:
        show(list(_orphans(namespace, store)), fmt=output)
        return
    if population is None:
        raise Failure("expected the name of a population, or --orphans; found neither")
    told = Policy() if store else _declared(population, namespace)
    policy = dataclasses.replace(
        told,
        keep_last=told.keep_last if keep_last is None else keep_last,
        every=told.every if every is None else every,
        max_policy_lag=told.max_policy_lag if max_policy_lag is None else max_policy_lag,
        grace=told.grace if grace is None else timedelta(hours=grace),
        runs=told.runs | frozenset(run or ()),
    )
    source = open_population(population, namespace=namespace, store=store)
    _collect(source, policy, dry_run=dry_run, output=output)


def _collect(source: PopulationStore, policy: Policy, *, dry_run: bool, output: Format) -> None:
    """Raises typer.Exit(1) when bytes that should have been moved are damaged."""
    if dry_run:
        _show(survey(source, policy=policy, now=now()), output)
        return
    with Bar() as bar:
        done = collect(source, policy=policy, now=now(), progress=bar.show)
    _show(done.plan, output)
    for damage in done.damaged:
        print(f"allele: not moved: {damage}; see `allele verify {source.population}`", file=sys.stderr)
    if done.damaged:
        raise typer.Exit(1)


def _show(plan: Plan, output: Format) -> None:
    """What goes and why; in a table for people also how much of it there is."""
    rows = list(_rows(plan))
    show(rows, fmt=output)
    if output is Format.table and rows:
        totals: dict[str, list[int]] = {}
        for row in rows:
            totals.setdefault(row["action"], []).append(row["bytes"])
        print("; ".join(f"{action}: {len(sizes)}, {sum(sizes)} bytes" for action, sizes in totals.items()))


def _rows(plan: Plan) -> Iterator[dict[str, Any]]:
    for retire in plan.retire:
        yield _row(
            "retire", _name(retire.fact), (retire.fact.length or 0) + (retire.fact.state_length or 0), retire.reason
        )
    for drop in plan.drop:
        yield _row("drop state", _name(drop.fact), drop.fact.state_length or 0, drop.reason)
    for compact in plan.compact:
        yield _row("compact", compact.path, compact.size - sum(r.length for r in compact.ranges), compact.reason)
    for delete in plan.delete:
        yield _row("delete", delete.path, delete.size, delete.reason)


def _row(action: str, what: str, size: int, reason: str) -> dict[str, Any]:
    return {"action": action, "what": what, "bytes": size, "reason": reason}


def _name(fact: Fact) -> str:
    return f"{fact.member}@{fact.revision}"


def _declared(population: str, namespace: str) -> Policy:
    """What the resources of the cluster say."""
    spec = get("adapterpopulation", population, namespace)["spec"]
    told = kept(Retention.model_validate(spec.get("retention", {})), listed("rlrun", namespace), population)
    return Policy(
        keep_last=told.keep_last,
        every=told.every,
        grace=timedelta(hours=told.grace_hours),
        max_policy_lag=told.max_policy_lag,
        runs=frozenset(told.runs),
    )


def _orphans(namespace: str, store: str | None) -> Iterator[dict[str, Any]]:
    """Folders with no readable population.json, or half erased; with a cluster, those whose uid none of its populations
    has, half erased or not."""
    owners = None if store else {o["metadata"]["uid"] for o in listed("adapterpopulation", namespace)}
    for url, environ in stores_of(namespace, store):
        root = Objects.open(url, environ)
        for name in folders(root, namespace):
            reason = _orphaned(root, namespace, name, owners)
            if reason is not None:
                objects = list(root.list(f"{namespace}/{name}"))
                yield {
                    "folder": root.url(f"{namespace}/{name}"),
                    "objects": len(objects),
                    "bytes": sum(o.size for o in objects),
                    "newest": max((o.modified for o in objects), default=None),
                    "reason": reason,
                }


def _orphaned(root: Objects, namespace: str, name: str, owners: set[str] | None) -> str | None:
    try:
        record = PopulationStore.of(root, namespace=namespace, population=name).record()
    except (InvalidRequest, OwnershipError) as e:
        return str(e).split("\n", 1)[0]
    if record is None:
        return "no population.json"
    begun = ", whose erasure was begun" if record.erasing else ""
    if owners is not None and record.uid not in owners:
        return f"no AdapterPopulation has the uid {record.uid}{begun}"
    if owners is None and begun:
        return f"it belongs to the uid {record.uid}{begun}"
    return None
