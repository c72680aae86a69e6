"""`allele diff`: how far two revisions are apart in what they do to the base, and in how they came to be.

An adapter adds s·B·A to a weight; A and B alone may differ where the product does not. Frobenius products of two
such low-rank matrices need only their r × r Gram matrices: ⟨B₁A₁, B₂A₂⟩ = ⟨B₁ᵀB₂, A₁A₂ᵀ⟩.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from allele.format import header
from allele.format.cast import widen
from allele.store.provenance import Provenance
from allele_cli.access import Adapter, NamespaceOption, StoreOption, parse_adapter
from allele_cli.failure import Failure
from allele_cli.output import Format, FormatOption, show
from allele_cli.revisions import history_of

Matrix = NDArray[np.float64]

_TENSOR = re.compile(r"(?P<module>.*layers\.(?P<layer>\d+)\.(?P<target>.+))\.lora_(?P<half>[AB])\.weight")


@dataclasses.dataclass(frozen=True)
class Revision:
    name: str
    scale: float
    tensors: dict[str, Matrix]
    provenance: Provenance


def diff(
    first: Adapter,
    second: Adapter,
    provenance: Annotated[
        bool, typer.Option("--provenance", help="Fields of the provenance that differ, instead of weights.")
    ] = False,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
    output: FormatOption = Format.table,
) -> None:
    """Norms of what each of two revisions adds to each weight of the base, of the difference, and the cosine.

    Example: `allele diff preferences/taste-0003@1 preferences/taste-0003@12 --namespace allele-demo`
    """
    a, b = (_read(name, namespace, store) for name in (first, second))
    show(list(_fields(a, b) if provenance else _weights(a, b)), fmt=output)


def _read(adapter: str, namespace: str, store: str | None) -> Revision:
    """The named revision, or the newest standing one."""
    source, name = parse_adapter(adapter, namespace, store)
    history = history_of(source, name)
    revision = name.revision or next(iter(history.standing()), None)
    fact = history.committed[revision] if revision is not None else None
    if fact is None or revision in history.retired or fact.weights is None or fact.provenance is None:
        raise Failure(
            f"{name}: expected a revision with bytes and provenance, found {revision}, which is retired or none"
        )
    made = source.read_provenance(fact.provenance)
    return Revision(
        f"{name.member}@{revision}", made.shapes[fact.group].scale, tensors(source.read(fact.weights)), made
    )


def tensors(packed: bytes) -> dict[str, Matrix]:
    """All tensors of a packed adapter in float64."""
    view = memoryview(packed)
    entries, start = header.parse(view, "packed adapter", tensors=view.nbytes)  # its digest was checked
    return {
        name: widen(view[start + e.start : start + e.end], e.dtype).reshape(e.shape).astype(np.float64)
        for name, e in entries.items()
    }


def _weights(a: Revision, b: Revision) -> Iterator[dict[str, Any]]:
    """One row for the whole, then one a layer and target; of a module that one of them lacks, the other is zero."""
    products = {key: _products(a, b, key[2]) for key in sorted(_modules(a) | _modules(b))}
    whole = np.sum(list(products.values()), axis=0)
    yield _row("all", "all", *whole)
    for (layer, target, _), found in products.items():
        yield _row(str(layer), target, *found)


def _modules(revision: Revision) -> set[tuple[int, str, str]]:
    """(layer, target, module) of each pair of matrices."""
    found = (_TENSOR.fullmatch(name) for name in revision.tensors)
    return {(int(m["layer"]), m["target"], m["module"]) for m in found if m is not None}


def _products(a: Revision, b: Revision, module: str) -> tuple[float, float, float]:
    """⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩ of what they add to one weight."""
    return _product(a, a, module), _product(b, b, module), _product(a, b, module)


def _product(a: Revision, b: Revision, module: str) -> float:
    names = [f"{module}.lora_{half}.weight" for half in "AB"]
    if any(name not in r.tensors for name in names for r in (a, b)):
        return 0.0
    (a1, b1), (a2, b2) = ([r.tensors[name] for name in names] for r in (a, b))
    if a1.shape[1] != a2.shape[1] or b1.shape[0] != b2.shape[0]:
        raise Failure(f"{module}: expected weights of one size, found {a.name} and {b.name} of different bases")
    return a.scale * b.scale * float(np.sum((b1.T @ b2) * (a1 @ a2.T)))


def _row(layer: str, target: str, aa: float, bb: float, ab: float) -> dict[str, Any]:
    return {
        "layer": layer,
        "target": target,
        "norm_first": math.sqrt(aa),
        "norm_second": math.sqrt(bb),
        "norm_difference": math.sqrt(max(0.0, aa + bb - 2 * ab)),
        "cosine": ab / math.sqrt(aa * bb) if aa and bb else None,
    }


def _fields(a: Revision, b: Revision) -> Iterator[dict[str, Any]]:
    first, second = (dict(_flat(r.provenance.model_dump(mode="json"))) for r in (a, b))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            yield {"field": key, "first": str(first.get(key, "-")), "second": str(second.get(key, "-"))}


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
