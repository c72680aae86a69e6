"""`allele base residual`: the base that adapters with baseMode SharedResidual train and serve over."""

from __future__ import annotations

import enum
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from allele.api.pool import QWEN3_TARGETS
from allele.protocol.commands import AdapterSpec
from allele.protocol.initialisation import InitSpec
from allele.store import bases
from allele.store.address import FORMS
from allele.store.factors import FactorStore
from allele.store.objects import Objects
from allele_cli.access import split_uri
from allele_cli.bar import Bar
from allele_cli.failure import Failure


class Kind(enum.StrEnum):
    PiSSA = "PiSSA"
    MiLoRA = "MiLoRA"
    OLoRA = "OLoRA"
    OLoRATail = "OLoRATail"


class Scaling(enum.StrEnum):
    Standard = "Standard"
    RankStabilised = "RankStabilised"
    Fixed = "Fixed"


class Dtype(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def residual(
    directory: Annotated[Path, typer.Argument(help="Folder with the base: config.json, tokenizer and safetensors.")],
    kind: Annotated[Kind, typer.Option(help="What adapters start from, as in adapter.init.kind.")],
    to: Annotated[str, typer.Option(help=f"Where: <store>/bases/<name>, <store> as in {FORMS}.")],
    rank: Annotated[int, typer.Option(help="As in adapter.rank.", min=1, max=256)] = 8,
    alpha: Annotated[float, typer.Option(help="As in adapter.alpha.", min=1e-6)] = 16,
    scaling: Annotated[Scaling, typer.Option(help="As in adapter.scaling.")] = Scaling.Standard,
    targets: Annotated[str, typer.Option(help="As in adapter.targets, comma-separated.")] = ",".join(QWEN3_TARGETS),
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights written; by default that of the base. float32 is exact.")
    ] = None,
) -> None:
    """Make a residual base, put it into a store and print its digest, for base.digest of pool and population.

    Its files are written to a temporary folder first (TMPDIR), as large as the base. Factors are kept in the store.

    Example: `allele base residual examples/preferences/base --kind PiSSA --to s3://allele/bases/preferences-pissa`
    """
    store, name = split_uri(to)
    spec = AdapterSpec(
        rank=rank,
        alpha=alpha,
        targets=tuple(targets.split(",")),
        scaling=scaling.value,
        init=InitSpec(kind=kind.value, base_mode="SharedResidual"),
    )
    print(make(directory, spec, store=store, name=name, dtype=dtype))


def make(directory: Path, spec: AdapterSpec, *, store: Objects, name: str, dtype: Dtype | None) -> str:
    """The digest of the new base."""
    try:
        import torch

        from allele_trainer.initialisation.residual import write
    except ImportError as e:
        raise Failure(f"allele base residual: expected the trainer's libraries (allele[trainer]): {e}") from e
    source = bases.digest(directory)
    with tempfile.TemporaryDirectory(prefix="allele-residual-") as folder, Bar() as bar:
        write(
            directory,
            Path(folder),
            digest=source,
            spec=spec,
            store=FactorStore(store, source),
            dtype=getattr(torch, dtype) if dtype else None,
            progress=bar.show,
        )
        return bases.put(store, name, Path(folder)).digest
