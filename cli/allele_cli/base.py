"""`allele base`: put a base model into a store once, fetch it into a pod or folder, both with digests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from allele.store import bases
from allele.store.address import FORMS
from allele_cli.access import split_uri
from allele_cli.residual import residual

app = typer.Typer(help="Base models in the store.", no_args_is_help=True)
app.command()(residual)


@app.command()
def put(
    directory: Annotated[Path, typer.Argument(help="Folder with config.json, tokenizer and safetensors.")],
    to: Annotated[str, typer.Option(help=f"Where: <store>/bases/<name>, <store> as in {FORMS}.")],
) -> None:
    """Upload a base model and print its digest.

    Example: `allele base put examples/preferences/base --to s3://allele/bases/preferences`
    """
    print(put_base(directory, uri=to))


@app.command()
def fetch(
    uri: Annotated[str, typer.Option(help="Where it was put: <store>/bases/<name>.")],
    digest: Annotated[str, typer.Option(help="Digest that `allele base put` printed.")],
    to: Annotated[Path, typer.Option(help="Folder to fetch into; complete files there are kept.")],
) -> None:
    """Download a base model and check every file.

    Example: `allele base fetch --uri s3://allele/bases/preferences --digest sha256:… --to /tmp/base`
    """
    store, name = split_uri(uri)
    bases.fetch(store, name, to, digest=digest)
    print(f"{to}: {digest}")


@app.command()
def digest(directory: Annotated[Path, typer.Argument(help="Folder with the base model.")]) -> None:
    """Print the digest of a folder, as `put` would.

    Example: `allele base digest examples/preferences/base`
    """
    print(bases.digest(directory))


def put_base(directory: Path, *, uri: str) -> str:
    """Upload a folder; returns its digest."""
    store, name = split_uri(uri)
    return bases.put(store, name, directory).digest
