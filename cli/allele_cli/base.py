"""`allele base`: put a base model into a store once, fetch it into a pod or folder, both with digests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from allele.store import bases

app = typer.Typer(help="Base models in the store.", no_args_is_help=True)


@app.command()
def put(
    directory: Annotated[Path, typer.Argument(help="Folder with config.json, tokenizer and safetensors.")],
    to: Annotated[str, typer.Option(help="Where: s3://bucket/path or file:///path.")],
) -> None:
    """Upload a base model and print its digest.

    Example: `allele base put examples/preferences/base --to s3://allele/bases/preferences`
    """
    print(bases.put(directory, uri=to))


@app.command()
def fetch(
    uri: Annotated[str, typer.Option(help="Where it lies: s3://bucket/path or file:///path.")],
    digest: Annotated[str, typer.Option(help="Digest that `allele base put` printed.")],
    to: Annotated[Path, typer.Option(help="Folder to fetch into; complete files there are kept.")],
) -> None:
    """Download a base model and check every file.

    Example: `allele base fetch --uri s3://allele/bases/preferences --digest sha256:… --to /tmp/base`
    """
    bases.fetch(uri, digest=digest, to=to)
    print(f"{to}: {digest}")


@app.command()
def digest(directory: Annotated[Path, typer.Argument(help="Folder with the base model.")]) -> None:
    """Print the digest of a folder, as `put` would.

    Example: `allele base digest examples/preferences/base`
    """
    print(bases.digest(directory))
