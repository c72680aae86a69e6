"""`allele`: one sub-command a module; heavy libraries are imported only by the commands that need them.

Typed errors end a command with one line on stderr and exit code 1: a traceback means a defect of ours.
"""

from __future__ import annotations

import sys

import typer

from allele.format import ShapeMismatch
from allele.protocol.errors import ProtocolError
from allele.store.errors import StoreError
from allele_cli import (
    base,
    catalogue,
    diff,
    evaluate,
    gc,
    local,
    members,
    report,
    revisions,
    rollback,
    simulate,
    sql,
    stores,
    transfer,
    verify,
    watch,
)
from allele_cli.failure import Failure
from allele_driver.environments.load import EnvironmentLoadError
from allele_driver.members import InvalidInput

app = typer.Typer(
    name="allele",
    help="Train, keep and serve populations of LoRA adapters on one resident base model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(base.app, name="base")
app.command("run")(local.run)
app.command("watch")(watch.watch)
app.command("stores")(stores.stores)
app.command("populations")(stores.populations)
app.command("members")(members.members)
app.command("revisions")(revisions.revisions)
app.command("lineage")(catalogue.lineage)
app.command("diff")(diff.diff)
app.command("export")(transfer.export)
app.command("import")(transfer.import_)
app.command("verify")(verify.verify)
app.command("rollback")(rollback.rollback)
app.command("pin")(rollback.pin)
app.command("gc")(gc.gc)
app.command("sql")(sql.sql)
app.command("eval")(evaluate.evaluate)
app.command("plot")(report.plot)
app.add_typer(simulate.app, name="simulate")


def main() -> None:
    try:
        app()
    except (Failure, ProtocolError, StoreError, ShapeMismatch, InvalidInput, EnvironmentLoadError, OSError) as e:
        print(f"allele: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
