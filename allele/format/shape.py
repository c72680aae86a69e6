"""AdapterShape: from a base model's config, a rank and target modules to the table of tensors and their places.

All adapters of one shape have the same size and byte layout, so row i of a trainer's bank, a packed file, and an
engine slot are copies of each other. Order: per layer, per group of modules that engines fuse, all A then all B, so
that a fused slot fills from one contiguous stretch. The experts of a layer count as one group: A of every expert, then
B of every expert, because engines keep the experts of a layer in one weight.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from allele.format import header
from allele.format.errors import ShapeMismatch

Dtype = Literal["F32", "BF16"]

FUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""(submodule of a layer, modules that Megatron-core and SGLang keep in one weight), in file order."""

TARGETS = tuple(m for _, modules in FUSED for m in modules)
_NUMPY: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2")}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERT_MODELS = ("qwen3_moe",)
"""Model types whose experts are `mlp.experts.<e>.{gate,up,down}_proj` in every layer and that have no shared expert."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSlot:
    """Place of one tensor: `offset` and `numel` count elements from the first of the row."""

    name: str
    shape: tuple[int, int]
    offset: int
    numel: int


@dataclasses.dataclass(frozen=True)
class AdapterShape:
    """Tensor table of every adapter with these targets, layers, sizes, rank and dtype. Build it by `from_model`."""

    tensors: tuple[TensorSlot, ...]
    rank: int
    targets: tuple[str, ...]
    """In file order."""
    dtype: Dtype

    @classmethod
    def from_model(
        cls, hf_config: Mapping[str, Any], *, rank: int, targets: Sequence[str], dtype: Dtype = "F32"
    ) -> AdapterShape:
        """`hf_config` is the base's config.json. A is [rank, in], B is [out, rank].

        Raises ShapeMismatch for a target that the model lacks, an impossible rank or dtype, or a config without sizes.
        """
        _check_request(hf_config, rank=rank, targets=targets, dtype=dtype)
        sizes = _linear_sizes(hf_config)
        experts = _experts(hf_config)
        slots: list[TensorSlot] = []
        offset = 0
        for layer in range(_size(hf_config, "num_hidden_layers")):
            for parent, modules in FUSED:
                copies = [f"mlp.experts.{e}" for e in range(experts)] if experts and parent == "mlp" else [parent]
                for half in ("A", "B"):
                    for path, module in ((p, m) for p in copies for m in modules if m in targets):
                        out, into = sizes[module]
                        shape = (rank, into) if half == "A" else (out, rank)
                        name = f"base_model.model.model.layers.{layer}.{path}.{module}.lora_{half}.weight"
                        slots.append(TensorSlot(name, shape, offset, shape[0] * shape[1]))
                        offset += slots[-1].numel
        ordered = tuple(t for t in TARGETS if t in targets)
        return cls(tensors=tuple(slots), rank=rank, targets=ordered, dtype=dtype)

    @functools.cached_property
    def numel(self) -> int:
        """Elements of one adapter: P, the length of a row."""
        return self.tensors[-1].offset + self.tensors[-1].numel

    @property
    def item_bytes(self) -> int:
        return header.ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of data, without the header."""
        return self.numel * self.item_bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of a packed adapter: header and data."""
        return len(self.header) + self.nbytes

    @functools.cached_property
    def entries(self) -> tuple[header.Entry, ...]:
        """The table as safetensors has it, in bytes."""
        size = self.item_bytes
        return tuple(
            header.Entry(t.name, self.dtype, t.shape, t.offset * size, (t.offset + t.numel) * size)
            for t in self.tensors
        )

    @functools.cached_property
    def header(self) -> bytes:
        """First bytes of every packed adapter of this shape; its length is a multiple of 64."""
        return header.build(self.entries, {})

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) of the header: equal for shapes whose rows are interchangeable."""
        return hashlib.sha256(self.header).hexdigest()

    def pack(self, row: Any) -> bytes:
        """A packed adapter of a row: any contiguous buffer of `numel` elements already in `dtype`. One copy."""
        data = header.flat(row, "row")
        if data.nbytes != self.nbytes:
            found = f"{data.nbytes} bytes"
            raise ShapeMismatch(
                "row", expected=f"{self.numel} {self.dtype} elements ({self.nbytes} bytes)", found=found
            )
        return b"".join((self.header, data))

    def unpack(self, packed: Any) -> memoryview:
        """The data of a packed adapter, not copied. Raises ShapeMismatch naming the first tensor that differs."""
        return header.check(header.flat(packed, "packed adapter"), self.header, self.entries, "packed adapter")

    def views(self, data: Any) -> dict[str, NDArray[Any]]:
        """Tensors by name over `data` (as `unpack` returns it), not copied. numpy has no bfloat16: BF16 comes as its
        bits in uint16."""
        flat = np.frombuffer(header.flat(data, "data"), dtype=_NUMPY[self.dtype])
        if flat.size != self.numel:
            raise ShapeMismatch("data", expected=f"{self.numel} {self.dtype} elements", found=f"{flat.size}")
        return {t.name: flat[t.offset : t.offset + t.numel].reshape(t.shape) for t in self.tensors}


def _check_request(hf_config: Mapping[str, Any], *, rank: int, targets: Sequence[str], dtype: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 256:
        raise ShapeMismatch("rank", expected="1..256", found=repr(rank))
    if dtype not in _NUMPY:
        raise ShapeMismatch("dtype", expected=" or ".join(_NUMPY), found=repr(dtype))
    unknown = [t for t in targets if t not in TARGETS]
    if unknown or not targets or len(set(targets)) != len(targets):
        raise ShapeMismatch("targets", expected=f"some of {', '.join(TARGETS)}, each once", found=list(targets))
    experts = next((k for k in _EXPERT_KEYS if hf_config.get(k)), None)
    mlp = [t for t in targets if t in ("gate_proj", "up_proj", "down_proj")]
    if not experts or not mlp:
        return
    if hf_config.get("model_type") not in _EXPERT_MODELS:
        raise ShapeMismatch(
            "targets", expected=f"attention modules, as the model has experts ({experts})", found=list(targets)
        )
    for key, usual in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if hf_config.get(key, usual) not in (usual, None):
            raise ShapeMismatch(
                f"config.json {key}", expected=f"{usual}: experts in every layer", found=repr(hf_config[key])
            )


def _experts(hf_config: Mapping[str, Any]) -> int:
    """Experts of each layer that take adapters; 0 for a dense model."""
    if hf_config.get("model_type") not in _EXPERT_MODELS:
        return 0
    key = next((k for k in _EXPERT_KEYS if hf_config.get(k)), None)
    return _size(hf_config, key) if key else 0


def _size(hf_config: Mapping[str, Any], key: str) -> int:
    value = hf_config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ShapeMismatch(f"config.json {key}", expected="a positive integer", found=repr(value))
    return value


def _linear_sizes(hf_config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of every target module of a Llama-like layer (Llama, Mistral, Qwen2, Qwen3), or of its experts."""
    hidden = _size(hf_config, "hidden_size")
    heads = _size(hf_config, "num_attention_heads")
    groups = _size(hf_config, "num_key_value_heads") if hf_config.get("num_key_value_heads") else heads
    head = _size(hf_config, "head_dim") if hf_config.get("head_dim") else hidden // heads
    inner = _size(hf_config, "moe_intermediate_size" if _experts(hf_config) else "intermediate_size")
    return {
        "q_proj": (heads * head, hidden),
        "k_proj": (groups * head, hidden),
        "v_proj": (groups * head, hidden),
        "o_proj": (hidden, heads * head),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
