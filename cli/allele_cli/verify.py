"""`allele verify`: re-hash what a population's catalogue names."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import typer
from rich.progress import DownloadColumn

from allele.store.verify import verify as verify_population
from allele_cli.access import NamespaceOption, PopulationArgument, StoreOption, open_population
from allele_cli.bar import Bar
from allele_cli.output import Format, FormatOption, show


def verify(
    population: PopulationArgument,
    member: Annotated[str | None, typer.Option(help="Only this member.")] = None,
    states: Annotated[bool, typer.Option("--states", help="Training states as well.")] = False,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
    output: FormatOption = Format.table,
) -> None:
    """Read every revision and compare its sha256 with the recorded one; list what is damaged and exit 1 if anything is.

    Example: `allele verify preferences --states --namespace allele-demo`
    """
    source = open_population(population, namespace=namespace, store=store)
    with Bar(DownloadColumn()) as bar:
        done = verify_population(
            source, member=member, states=states, progress=lambda n, total: bar.show("verify", n, total)
        )
    if done.damaged or output is not Format.table:
        show([dataclasses.asdict(d) for d in done.damaged], fmt=output)
    counts = f"{done.revisions} revisions, {done.ranges} ranges, {done.bytes} bytes: {len(done.damaged)} damaged"
    print(
        f"{population}: {counts}",
        file=sys.stderr if done.damaged or output is not Format.table else sys.stdout,
    )
    if done.damaged:
        raise typer.Exit(1)
