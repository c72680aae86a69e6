"""`allele rollback | pin`: facts that people add to a catalogue."""

from __future__ import annotations

from typing import Annotated

import typer

from allele.protocol.adapters import AdapterName
from allele.store.facts import Fact, Kind
from allele.store.history import History
from allele.store.population import PopulationStore
from allele_cli.access import Adapter, NamespaceOption, StoreOption, parse_adapter
from allele_cli.failure import Failure
from allele_cli.revisions import history_of

RUN = "hand"
"""Under which people commit; of two at once, the older is told to look again."""


def rollback(
    adapter: Adapter,
    reason: Annotated[str, typer.Option(help="Why, for those who find the hold later.")] = "",
    lift: Annotated[bool, typer.Option("--lift", help="Lift the hold: what drivers exposed last is served.")] = False,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
) -> None:
    """Serve an older revision, by default the one exposed before, and hold it: nothing else is exposed meanwhile.

    Example: `allele rollback preferences/taste-0003@7 --reason "answers in French"`
    """
    source, name = parse_adapter(adapter, namespace, store)
    history = history_of(source, name)
    if lift:
        if history.held is None:
            raise Failure(f"{name}: expected a hold to lift, found none")
        fact = Fact(kind="Held", member=name.member, reason=reason or None)
        said = f"the hold of revision {history.held} is lifted, {_served(history.exposures[-1:])}"
    else:
        if not reason:
            raise Failure("--reason: expected why, found nothing; who finds the hold later will want to know")
        revision = _target(history, name)
        fact = Fact(kind="Held", member=name.member, revision=revision, reason=reason)
        said = f"revision {revision} is held, {_served([r for r in [history.served] if r])} before"
    _commit(source, fact)
    print(f"{name.population}/{name.member}: {said}")


def pin(
    adapter: Adapter,
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    unpin: Annotated[bool, typer.Option("--unpin", help="Let retention decide again.")] = False,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
) -> None:
    """Keep a revision (default: the one that is served) whatever the retention.

    Example: `allele pin preferences/taste-0003@7 --reason "in the paper"`
    """
    source, name = parse_adapter(adapter, namespace, store)
    history = history_of(source, name)
    revision = name.revision or history.served
    if revision is None:
        raise Failure(f"{name}: nothing is exposed; name a revision as {name.member}@N")
    if unpin and revision not in history.pinned:
        raise Failure(
            f"{name}: expected revision {revision} to be pinned; pinned are {sorted(history.pinned) or 'none'}"
        )
    if not unpin:
        _check_there(history, name, revision)
    kind: Kind = "Unpinned" if unpin else "Pinned"
    _commit(source, Fact(kind=kind, member=name.member, revision=revision, reason=reason or None))
    if not unpin and revision in history_of(source, name).retired:
        raise Failure(f"{name}: revision {revision} was retired meanwhile; its bytes stay, but gateways refuse it")
    print(f"{name.population}/{name.member}: revision {revision} is {kind.lower()}")


def _target(history: History, name: AdapterName) -> int:
    revision = name.revision if name.revision is not None else history.served_before
    if revision is None:
        raise Failure(f"{name}: no revision was exposed before {history.served}; name one as {name.member}@N")
    _check_there(history, name, revision)
    return revision


def _check_there(history: History, name: AdapterName, revision: int) -> None:
    if revision in history.retired:
        raise Failure(
            f"{name}: revision {revision} is retired, its bytes may be gone; see `allele revisions "
            f"{name.population}/{name.member}`"
        )


def _served(revisions: list[int]) -> str:
    return f"revision {revisions[0]} was served" if revisions else "none was served"


def _commit(source: PopulationStore, fact: Fact) -> None:
    writer = source.catalogue.start(RUN)
    writer.commit((writer.last_step or 0) + 1, [fact])
