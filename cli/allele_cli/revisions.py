"""`allele revisions`: everything that a member was, and what became of each revision."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from allele.protocol.adapters import AdapterName
from allele.store.facts import from_arrow
from allele.store.history import History
from allele.store.population import PopulationStore
from allele_cli.access import Adapter, NamespaceOption, StoreOption, parse_adapter, unknown
from allele_cli.failure import Failure
from allele_cli.output import Format, FormatOption, show


def revisions(
    adapter: Adapter,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
    output: FormatOption = Format.table,
) -> None:
    """All revisions of a member, the newest first, with what became of them.

    Example: `allele revisions preferences/taste-0003 --namespace allele-demo`
    """
    source, name = parse_adapter(adapter, namespace, store)
    history = history_of(source, name)
    wanted = [r for r in sorted(history.committed, reverse=True) if name.revision in (None, r)]
    show([_row(history, r) for r in wanted], fmt=output)


def history_of(source: PopulationStore, name: AdapterName) -> History:
    """Raises Failure when the catalogue knows no such member, or no such revision of it."""
    table = source.catalogue.table()
    facts = from_arrow(table.filter(pc.equal(table["member"], name.member)))
    history = History.of(name.member, sorted(facts, key=lambda f: f.order))
    if not history.committed:
        raise unknown(name)
    if name.revision is not None and name.revision not in history.committed:
        raise Failure(f"{name}: no such committed revision; the newest is {max(history.committed)}")
    return history


def _row(history: History, revision: int) -> dict[str, Any]:
    fact = history.committed[revision]
    return {
        "revision": revision,
        "state": " ".join(states(history, revision)) or None,
        "parent": fact.parent,
        "run": fact.run,
        "step": fact.step,
        "reward": fact.metrics.get("reward"),
        "lag": fact.metrics.get("policy_lag"),
        "bytes": fact.length,
        "state_bytes": fact.state_length,
        "digest": fact.digest and fact.digest[:12],
        "committed": history.since[revision].strftime("%Y-%m-%d %H:%M:%S"),
    }


def states(history: History, revision: int) -> list[str]:
    """Words for what a revision is; none for one that only exists."""
    words = {
        "exposed": history.exposures[-1:] == [revision],
        "held": history.held == revision,
        "pinned": revision in history.pinned,
        "abandoned": revision in history.abandoned,
        "retired": revision in history.retired,
    }
    return [word for word, so in words.items() if so]
