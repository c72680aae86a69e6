"""`allele`: one sub-command a module; heavy libraries are imported only by the commands that need them.

Typed errors end a command with one line on stderr and exit code 1: a traceback means a defect of ours.
"""

from __future__ import annotations

import sys

import typer

from allele.format import ShapeMismatch
from allele.protocol.errors import ProtocolError
from allele.store.errors import StoreError
from allele_cli import base, catalogue, evaluate, local, report, transfer, watch
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
app.command("members")(catalogue.members)
app.command("lineage")(catalogue.lineage)
app.command("export")(transfer.export)
app.command("import")(transfer.import_)
app.command("eval")(evaluate.evaluate)
app.command("plot")(report.plot)


def main() -> None:
    try:
        app()
    except (Failure, ProtocolError, StoreError, ShapeMismatch, InvalidInput, EnvironmentLoadError, OSError) as e:
        print(f"allele: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
