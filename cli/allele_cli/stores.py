"""`allele stores | populations`: what there is, from the cluster or straight from a store."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from allele.protocol.adapters import POPULATION_NAME
from allele.store import capability
from allele.store.objects import Objects
from allele.store.population import PopulationStore
from allele_cli.access import NamespaceOption, StoreOption, listed, stores_of
from allele_cli.output import Format, FormatOption, show


def stores(
    namespace: NamespaceOption = "default", store: StoreOption = None, output: FormatOption = Format.table
) -> None:
    """AdapterStores of the namespace as the operator found them; with --store, what a probe from here finds.

    LATENCY is that of a put, a get and a conditional put.

    Example: `allele stores --namespace allele-demo`
    """
    if store is None:
        show([_found(o) for o in listed("adapterstore", namespace)], fmt=output)
        return
    made = capability.probe(store)
    names = {
        "CreateOnly": made.create_only,
        "IfMatch": made.if_match,
        "RangedRead": made.ranged_read,
        "List": made.list,
        "Checksums": made.checksums,
    }
    row = {
        "name": None,
        "url": store,
        "reachable": str(made.reachable),
        "reason": made.reason,
        "capabilities": " ".join(name for name, there in names.items() if there),
        "latency": made.latency and str(made.latency),
        "message": made.message.removeprefix(f"{store}: "),
    }
    show([row], fmt=output)


def _found(obj: dict[str, Any]) -> dict[str, Any]:
    status = obj.get("status", {})
    reachable: dict[str, Any] = next((c for c in status.get("conditions", ()) if c["type"] == "Reachable"), {})
    return {
        "name": obj["metadata"]["name"],
        "url": status.get("url"),
        "reachable": reachable.get("status", "Unknown"),
        "reason": reachable.get("reason"),
        "capabilities": " ".join(status.get("capabilities", ())),
        "latency": _latency(status.get("latency")),
        "message": reachable.get("message"),
    }


def _latency(found: dict[str, int] | None) -> str | None:
    """As a probe's, but rounded up."""
    return "{put}/{get}/{conditionalPut} ms".format(**found) if found else None


def populations(
    namespace: NamespaceOption = "default", store: StoreOption = None, output: FormatOption = Format.table
) -> None:
    """Populations of the namespace that its stores hold, with what each has in it.

    Example: `allele populations --namespace allele-demo`
    """
    rows = []
    for url, environ in stores_of(namespace, store):
        root = Objects.open(url, environ)
        for name in folders(root, namespace):
            rows.append(_row(PopulationStore.of(root, namespace=namespace, population=name)))
    show(rows, fmt=output)


def folders(root: Objects, namespace: str) -> list[str]:
    """Folders of a namespace in a store that can be populations."""
    return [name for name in root.folders(namespace) if POPULATION_NAME.fullmatch(name)]


def _row(population: PopulationStore) -> dict[str, Any]:
    record = population.record()
    erasing = record is not None and record.erasing
    members, revisions = (None, None) if erasing else _counts(population)  # nobody can read what goes
    return {
        "population": population.population,
        "uid": record and record.uid,
        "state": "being erased" if erasing else "",
        "base": record and record.base_digest[:19],
        "groups": " ".join(sorted(record.shapes)) if record else None,
        "members": members,
        "revisions": revisions,
        "bytes": sum(o.size for o in population.objects.list()),
        "url": population.objects.url(),
    }


def _counts(population: PopulationStore) -> tuple[int, int]:
    """Members and revisions."""
    facts = population.catalogue.table()
    committed = facts.filter(pc.equal(facts["kind"], "Committed"))
    revisions = committed.group_by(["member", "revision"]).aggregate([]).num_rows
    return int(pc.count_distinct(committed["member"]).as_py()), int(revisions)
