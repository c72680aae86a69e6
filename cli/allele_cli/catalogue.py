"""`allele lineage`: where a revision came from."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.tree import Tree

from allele.protocol.adapters import AdapterName
from allele.store.facts import Fact
from allele.store.index import Index
from allele.store.population import PopulationStore
from allele_cli.access import Adapter, NamespaceOption, StoreOption, asked, parse_adapter
from allele_cli.output import Format, FormatOption, show


def lineage(
    adapter: Adapter,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
    output: FormatOption = Format.table,
) -> None:
    """Where a revision came from: its parents down to the base, with step, digest and data.

    Example: `allele lineage preferences/taste-0003 --namespace allele-demo`
    """
    source, name = parse_adapter(adapter, namespace, store)
    chain = _chain(Index.load(source.catalogue), name)
    if output is not Format.table:
        show([_link(source, fact) for fact in chain], fmt=output)
        return
    tree = Tree(f"[bold]{name.population}/{name.member}[/]")
    for fact in chain:
        link = _link(source, fact)
        at = tree.add(
            f"@{link['revision']}  step {link['step']}  {link['digest'][:12]}  {link['time']:%Y-%m-%d %H:%M:%S}"
        )
        if fact is chain[0]:
            for key in ("run", "environment", "code_digest", "prompts", "base", "provenance"):
                at.add(f"{key.replace('_', ' ')}: {link[key]}")
    tree.add(f"base {_link(source, chain[-1])['base']}")
    Console().print(tree)


def _chain(index: Index, name: AdapterName) -> list[Fact]:
    """The asked revision (default: newest) and its parents."""
    chain = [asked(index, name)]
    while (parent := chain[-1].parent) is not None and (at := index.get(name.member, parent)) is not None:
        chain.append(at)
    return chain


def _link(source: PopulationStore, fact: Fact) -> dict[str, Any]:
    made = source.read_provenance(fact.provenance) if fact.provenance else None
    return {
        "revision": fact.revision,
        "parent": fact.parent,
        "step": fact.step,
        "digest": fact.digest or "",
        "run": made and made.run,
        "environment": made and made.environment,
        "code_digest": made and made.code_digest,
        "prompts": made and made.data.prompts,
        "base": made and made.base.digest,
        "provenance": fact.provenance,
        "time": fact.time,
    }
