"""Writes a residual base: the files of a base with s·B0·A0 taken out of its target weights.

It is a base like any other, with a digest of its own, that trainer and engines load as they load every base; what was
taken out lies in it, as `residual.json` and as a PEFT folder, so that it is part of the digest. The subtraction is in
double precision and then rounded once: in bfloat16 that changes W by up to 2⁻⁹ of each element of the residual, and so
what a new adapter computes (docs/initialisation.md has numbers).
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from allele.format import AdapterShape, ShapeMismatch, export_peft
from allele.protocol.commands import AdapterSpec
from allele.protocol.errors import InvalidRequest
from allele.protocol.initialisation import RESIDUAL, RESIDUAL_ADAPTER, Residual
from allele.store.factors import FactorStore
from allele_trainer.initialisation import rows
from allele_trainer.initialisation.factors import DECOMPOSITIONS
from allele_trainer.initialisation.source import FactorSource

_INDEX = "model.safetensors.index.json"


def write(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    digest: str,
    spec: AdapterSpec,
    store: FactorStore,
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Residual:
    """Write the residual of the base `source`, whose digest is `digest`, into the empty folder `target`.

    `dtype`: of all floating-point weights, by default that of each in the source. `progress` is told what is being
    done, how much of it is done and how much there is. Raises InvalidRequest for a source or a spec that cannot be.
    """
    if (source / RESIDUAL).exists():
        raise InvalidRequest(f"{source}: expected a base, found a residual base ({RESIDUAL})")
    config = json.loads((source / "config.json").read_text())
    try:
        shape = rows.trained_shape(config, spec)
    except ShapeMismatch as e:
        raise InvalidRequest(str(e)) from e
    row = _row(source, shape, spec, store, progress)
    residual = Residual(
        source_digest=digest,
        kind=spec.init.kind,
        rank=spec.rank,
        alpha=spec.alpha,
        scaling=spec.scaling,
        targets=shape.targets,
        factors=rows.digest(row),
    )
    target.mkdir(parents=True, exist_ok=True)
    files = [p for p in sorted(source.rglob("*")) if p.is_file() and not _hidden(p.relative_to(source))]
    views = {t.name: row[t.offset : t.offset + t.numel].view(t.shape) for t in shape.tensors}
    left = {rows.module(t.name) for t in shape.tensors}
    for done, path in enumerate(files):
        progress("files", done, len(files))
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors" and path.parent == source:
            left -= _write_weights(path, copy, views, scale=spec.scale, dtype=dtype)
        else:
            shutil.copyfile(path, copy)
    if left:
        raise InvalidRequest(f"{source}: expected a weight for each target, found none for {sorted(left)[:3]}")
    if dtype is not None:
        _tell_dtype(target, config, dtype)
    export_peft(shape.pack(row.numpy()), target / RESIDUAL_ADAPTER, shape=shape, scale=spec.scale, base_name=digest)
    (target / RESIDUAL).write_text(residual.model_dump_json(indent=2) + "\n")
    progress("files", len(files), len(files))
    return residual


def _row(
    source: pathlib.Path,
    shape: AdapterShape,
    spec: AdapterSpec,
    store: FactorStore,
    progress: Callable[[str, int, int], None],
) -> Tensor:
    modules, decomposition = rows.weights(shape), DECOMPOSITIONS[spec.init.kind]
    found = FactorSource(source, store).find(
        modules, decomposition, spec.rank, progress=lambda done: progress("factors", done, len(modules))
    )
    some = {name: f.some(decomposition, spec.rank) for name, f in found.items()}
    return rows.first(shape, some, kind=spec.init.kind, scale=spec.scale)


def _write_weights(
    path: pathlib.Path, copy: pathlib.Path, views: Mapping[str, Tensor], *, scale: float, dtype: torch.dtype | None
) -> set[str]:
    """Gives the modules whose weights are in this file."""
    pairs = {rows.module(name): name.rpartition(".lora_")[0] for name in views}
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata()
    for name, weight in tensors.items():
        kept = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
        if (module := name.removesuffix(".weight")) in pairs:
            b, a = (views[f"{pairs[module]}.lora_{half}.weight"].double() for half in "BA")
            weight = weight.double() - scale * (b @ a)
        tensors[name] = weight.to(kept).contiguous()
    save_file(tensors, copy, metadata=metadata)
    return {name.removesuffix(".weight") for name in tensors} & pairs.keys()


def _tell_dtype(target: pathlib.Path, config: Mapping[str, object], dtype: torch.dtype) -> None:
    """Of the files: an engine loads a base in the dtype that its config says."""
    name = str(dtype).removeprefix("torch.")
    told = {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}
    (target / "config.json").write_text(json.dumps({**config, **told}, indent=2) + "\n")
    index = target / _INDEX
    if index.exists():
        found = json.loads(index.read_text())
        sizes = (p.stat().st_size for p in target.glob("*.safetensors"))
        index.write_text(json.dumps(found | {"metadata": {"total_size": sum(sizes)}}, indent=2) + "\n")


def _hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
