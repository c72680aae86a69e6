"""Where the tensors of a fused group lie inside a rank's row.

The row of the bank has the element order of `allele.format.AdapterShape`, so that an export is one copy. Megatron
fuses q, k, v into one linear and gate, up into another; the shape puts the A matrices of such a group side by side,
so one grouped GEMM serves all of them. A shape that broke this would train wrong adapters in silence: it is checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from allele_trainer.bank.shard import LayoutError, Shard, site

GROUPS: Mapping[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron linear → PEFT target modules that it holds, in order."""

_LINEAR = {target: linear for linear, targets in GROUPS.items() for target in targets}


@dataclasses.dataclass(frozen=True)
class Block:
    """The part of a local row that one Megatron linear of one layer uses; offsets in elements."""

    targets: tuple[str, ...]
    rank: int
    inputs: int
    a_offset: int
    b_offsets: tuple[int, ...]
    outputs: tuple[int, ...]


def linear_name(linear: str, expert: int | None = None) -> str:
    """The name of a linear in a layer: that of an expert says which, counted over all ranks."""
    return linear if expert is None else f"experts.{expert}.{linear}"


def blocks(shard: Shard) -> dict[tuple[int, str], Block]:
    """(layer, `linear_name`) → Block, for the targets that the shape has and the layers and experts of this rank.

    Raises LayoutError when a target is unknown or the A matrices of a group are not adjacent.
    """
    found: dict[tuple[int, str], dict[str, dict[str, tuple[int, tuple[int, int]]]]] = {}
    for tensor in shard.tensors:
        where = site(tensor.name)
        if where.target not in _LINEAR:
            raise LayoutError(f"{tensor.name}: expected one of the targets {sorted(_LINEAR)}, found {where.target}")
        key = where.layer, linear_name(_LINEAR[where.target], where.expert)
        found.setdefault(key, {}).setdefault(where.target, {})[where.kind] = (tensor.offset, tensor.shape)
    return {key: _block(pairs) for key, pairs in found.items()}


def _block(pairs: Mapping[str, Mapping[str, tuple[int, tuple[int, int]]]]) -> Block:
    targets = tuple(t for group in GROUPS.values() for t in group if t in pairs)
    a_offset, (rank, inputs) = pairs[targets[0]]["A"]
    for k, target in enumerate(targets):
        expected = (a_offset + k * rank * inputs, (rank, inputs))
        if pairs[target]["A"] != expected:
            raise LayoutError(f"{target}.lora_A: expected (offset, shape) {expected}, found {pairs[target]['A']}")
    return Block(
        targets=targets,
        rank=rank,
        inputs=inputs,
        a_offset=a_offset,
        b_offsets=tuple(pairs[t]["B"][0] for t in targets),
        outputs=tuple(pairs[t]["B"][1][0] for t in targets),
    )
