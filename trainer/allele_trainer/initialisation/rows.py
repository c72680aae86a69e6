"""Factors as rows of a bank: where each goes, what an adapter of rank 2r holds, and which elements train.

A Rank2r adapter is B = [B | −B0], A = [A; A0] over the untouched base: s·(B·A − B0·A0), in a form that PEFT and engines
read without knowing. Its second half and MiCA's B are as much a part of the row as the rest, but take no step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from allele.format import AdapterShape
from allele.format.shape import TensorSlot
from allele.protocol.commands import AdapterSpec
from allele.protocol.initialisation import InitKind, InitSpec
from allele.store.factors import Factors
from allele_trainer.initialisation.factors import started

_PREFIX = "base_model.model."


def module(tensor: str) -> str:
    """The weight in the base's files, without `.weight`, that a tensor of an adapter belongs to."""
    return tensor.removeprefix(_PREFIX).rpartition(".lora_")[0]


def weights(shape: AdapterShape) -> dict[str, tuple[int, int]]:
    """Module → (out, in), of all that the adapter changes."""
    found: dict[str, tuple[int, int]] = {}
    for tensor in shape.tensors:
        out, into = found.get(module(tensor.name), (0, 0))
        found[module(tensor.name)] = (out, tensor.shape[1]) if _is_a(tensor) else (tensor.shape[0], into)
    return found


def first(shape: AdapterShape, found: Mapping[str, Factors], *, kind: InitKind, scale: float) -> Tensor:
    """`[P]` of an adapter that starts from these factors of its modules."""
    row = torch.zeros(shape.numel)
    pairs = {name: started(f, kind=kind, scale=scale) for name, f in found.items()}
    for tensor, view in _views(shape, row):
        b, a = pairs[module(tensor.name)]
        view.copy_(a if _is_a(tensor) else b)
    return row


def doubled(row: Tensor, shape: AdapterShape, stored: AdapterShape) -> Tensor:
    """`[P]` of rank r → `[2P]` of rank 2r, with −B0 and A0 behind B and A."""
    whole = torch.zeros(stored.numel)
    for (tensor, half), (_, view) in zip(_views(shape, row), _views(stored, whole), strict=True):
        # 0 − B0 and not −B0: a zero with a minus would lose it in the first step.
        view.copy_(torch.cat([half, half]) if _is_a(tensor) else torch.cat([half, 0 - half], dim=1))
    return whole


def trained(shape: AdapterShape, init: InitSpec) -> Tensor | None:
    """`[P]` of ones where an adapter of this shape trains and zeros where it is frozen; None where all of it trains."""
    if init.kind != "MiCA" and init.base_mode != "Rank2r":
        return None
    mask = torch.ones(shape.numel)
    half = shape.rank // 2
    for tensor, view in _views(shape, mask):
        if init.kind == "MiCA":
            view.fill_(float(_is_a(tensor)))
        elif _is_a(tensor):
            view[half:] = 0
        else:
            view[:, half:] = 0
    return mask


def digest(row: Tensor) -> str:
    """Of B0 and A0, as a row `[P]` of rank r: `Residual.factors`."""
    return hashlib.sha256(row.numpy().astype("<f4").tobytes()).hexdigest()


def trained_shape(config: Mapping[str, object], spec: AdapterSpec) -> AdapterShape:
    """Of the part that trains."""
    return AdapterShape.from_model(config, rank=spec.rank, targets=spec.targets)


def _views(shape: AdapterShape, row: Tensor) -> Iterator[tuple[TensorSlot, Tensor]]:
    for t in shape.tensors:
        yield t, row[t.offset : t.offset + t.numel].view(t.shape)


def _is_a(tensor: TensorSlot) -> bool:
    return ".lora_A." in tensor.name
