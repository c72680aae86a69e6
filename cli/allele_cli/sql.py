"""`allele sql`: DuckDB on a population's catalogue."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from allele_cli.access import NamespaceOption, PopulationArgument, StoreOption, open_population
from allele_cli.failure import Failure
from allele_cli.output import Format, FormatOption, show

HEADS = """
create view heads as
with gone as (select distinct member, revision from facts where kind in ('Abandoned', 'Retired')),
newest as (
  select member, max(revision) as newest from facts
  where kind = 'Committed' and (member, revision) not in (select member, revision from gone) group by member),
exposed as (select member, arg_max(revision, "time") as exposed from facts where kind = 'Exposed' group by member),
holds as (select member, arg_max_null(revision, "time") as held from facts where kind = 'Held' group by member),
bytes as (
  select member, revision, arg_max("group", "time") as "group", arg_max(digest, "time") as digest,
    arg_max(metrics, "time") as metrics, max(step) as step, min("time") as "time"
  from facts where kind = 'Committed' group by member, revision)
select newest.member, "group", newest, coalesce(held, exposed) as exposed, held, step,
  metrics['reward'] as reward, digest, "time"
from newest join bytes on bytes.member = newest.member and bytes.revision = newest.newest
left join exposed on exposed.member = newest.member left join holds on holds.member = newest.member
"""
"""One row a member: its newest standing revision, and what is served."""


def sql(
    population: PopulationArgument,
    query: Annotated[str | None, typer.Argument(help="One statement; absent: a prompt.")] = None,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
    output: FormatOption = Format.table,
) -> None:
    """Query the catalogue: `facts` has one row a fact, `heads` one row a member.

    Example: `allele sql preferences "select kind, count(*) from facts group by kind"`
    """
    catalogue = open_population(population, namespace=namespace, store=store).catalogue
    database = connect(catalogue.table())
    if query is not None:
        show(rows(database, query), fmt=output)
        return
    print("tables: facts, heads; end with Ctrl-D")
    while (line := _ask()) is not None:
        try:
            show(rows(database, line), fmt=output)
        except Failure as e:
            print(e)


def connect(facts: Any) -> Any:
    """A DuckDB connection in memory with `facts`, an Arrow table, and `heads`."""
    try:
        import duckdb
    except ImportError as e:
        raise Failure(f"allele sql: expected DuckDB (allele[cli]): {e}") from e
    database = duckdb.connect()
    database.register("facts", facts)
    database.execute(HEADS)
    return database


def rows(database: Any, query: str) -> list[dict[str, Any]]:
    """Raises Failure with DuckDB's words."""
    import duckdb

    try:
        done = database.execute(query)
        names = [column[0] for column in done.description or ()]
        return [dict(zip(names, row, strict=True)) for row in done.fetchall()]
    except duckdb.Error as e:
        raise Failure("sql: " + " ".join(str(e).split())) from e


def _ask() -> str | None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history
    try:
        return input("sql> ").strip() or "select 1 where false"
    except EOFError:
        print()
        return None
