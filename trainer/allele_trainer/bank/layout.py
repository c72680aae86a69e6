"""Where the tensors of a fused group lie inside a row.

The row of the bank has the element order of `allele.format.AdapterShape`, so that an export is one copy. Megatron
fuses q, k, v into one linear and gate, up into another; the shape puts the A matrices of such a group side by side,
so one grouped GEMM serves all of them. A shape that broke this would train wrong adapters in silence: it is checked.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from allele.format import AdapterShape

GROUPS: Mapping[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron linear → PEFT target modules that it holds, in order."""

_NAME = re.compile(r"layers\.(?P<layer>\d+)\.\w+\.(?P<target>\w+_proj)\.lora_(?P<kind>[AB])\.weight$")


class LayoutError(Exception):
    """The shape's tensor table is not what the grouped linears need."""


@dataclasses.dataclass(frozen=True)
class Block:
    """The part of a row that one Megatron linear of one layer uses; offsets in elements."""

    targets: tuple[str, ...]
    rank: int
    inputs: int
    a_offset: int
    b_offsets: tuple[int, ...]
    outputs: tuple[int, ...]


def blocks(shape: AdapterShape) -> dict[tuple[int, str], Block]:
    """(layer, Megatron linear) → Block, for the targets that the shape has.

    Raises LayoutError when a name is unknown or the A matrices of a group are not adjacent.
    """
    found: dict[tuple[int, str], dict[str, tuple[int, tuple[int, ...]]]] = {}
    for tensor in shape.tensors:
        match = _NAME.search(tensor.name)
        if match is None:
            raise LayoutError(f"{tensor.name}: expected layers.<i>.<module>.<target>.lora_A|B.weight")
        found.setdefault((int(match["layer"]), match["target"]), {})[match["kind"]] = (
            tensor.offset,
            tuple(tensor.shape),
        )
    layers = sorted({layer for layer, _ in found})
    result: dict[tuple[int, str], Block] = {}
    for layer in layers:
        for group, targets in GROUPS.items():
            present = tuple(t for t in targets if (layer, t) in found)
            if present:
                result[layer, group] = _block(present, [found.pop((layer, t)) for t in present])
    if found:
        raise LayoutError(f"targets: expected some of {sorted(sum(GROUPS.values(), ()))}, found {sorted(found)}")
    return result


def _block(targets: tuple[str, ...], pairs: list[dict[str, tuple[int, tuple[int, ...]]]]) -> Block:
    a_offset, (rank, inputs) = pairs[0]["A"]
    for k, (target, pair) in enumerate(zip(targets, pairs, strict=True)):
        expected = (a_offset + k * rank * inputs, (rank, inputs))
        if pair["A"] != expected:
            raise LayoutError(f"{target}.lora_A: expected (offset, shape) {expected}, found {pair['A']}")
    return Block(
        targets=targets,
        rank=rank,
        inputs=inputs,
        a_offset=a_offset,
        b_offsets=tuple(p["B"][0] for p in pairs),
        outputs=tuple(p["B"][1][0] for p in pairs),
    )
