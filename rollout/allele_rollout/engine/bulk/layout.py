"""Where each element of a packed adapter goes in an engine slot.

Not worked out here: SGLang's own loader is run once per layout, on an adapter whose elements are their own positions,
into a float64 copy of one slot. What stands in the slot afterwards is the mapping, with SGLang's fusing, zero fill,
rank handling, tensor-parallel slicing and expert scaling in it. This holds as long as loading moves and scales weights
and does nothing that depends on their values, which `seen` watches.

The probe takes about four float64 copies of one adapter, and milliseconds for a small model.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_log = logging.getLogger(__name__)
_PROBE = "allele-layout"
_BUFFERS = (
    "A_buffer",
    "B_buffer",
    "embedding_A_buffer",
    "embedding_B_buffer",
    "lm_head_A_buffer",
    "lm_head_B_buffer",
    "new_embeddings_buffer",
)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Box = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A box of a buffer that is one stretch of the row."""

    buffer: int
    box: Box
    shape: torch.Size
    strides: tuple[int, ...]
    first: int
    scaled: bool
    """Multiplied by the adapter's scale on the way in, as expert weights are."""


@dataclasses.dataclass(frozen=True)
class _Gather:
    """A box of a buffer that is elements of the row from here and there, and zeros."""

    buffer: int
    box: Box
    shape: torch.Size
    index: torch.Tensor
    held: torch.Tensor
    scaled: bool


class Layout:
    """The mapping for all adapters with this safetensors header and this adapter_config."""

    def __init__(self, manager: Any, config: Mapping[str, Any], header: bytes) -> None:
        """`header`: the JSON of a safetensors file. Raises ValueError for what SGLang would not load."""
        from sglang.srt.lora.lora_config import LoRAConfig
        from sglang.srt.lora.lora_registry import LoRARef

        self.config = LoRAConfig.from_dict(dict(config), base_vocab_size=manager.base_hf_config.vocab_size)
        manager.validate_new_adapter(self.config, LoRARef(lora_name="", lora_path=""))
        table = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        names = {entry["dtype"] for entry in table.values()}
        if len(names) != 1 or not names <= _DTYPES.keys():
            raise ValueError(f"dtype: expected one of {sorted(_DTYPES)} for all tensors, found {sorted(names)}")
        self.dtype = _DTYPES[names.pop()]
        self.nbytes = max(entry["data_offsets"][1] for entry in table.values())
        self.scaling = self.config.lora_alpha / self.config.r
        self._device = manager.device
        self._zeros: list[tuple[int, Box]] = []
        self._runs: list[_Run] = []
        self._gathers: list[_Gather] = []
        self._views: dict[int, tuple[list[torch.Tensor], ...]] = {}
        tensors = self._numbered(table)
        once, twice = (_probe(manager, self.config, tensors, scaling) for scaling in (1.0, 2.0))
        for i, (found, doubled) in enumerate(zip(once, twice, strict=True)):
            self._map(i, found, doubled)
        _log.info("Layout of %d tensors: %d runs, %d gathers", len(table), len(self._runs), len(self._gathers))

    def _numbered(self, table: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Each tensor with the positions of its elements in the row, counted from 1, in place of them."""
        size = self.dtype.itemsize
        number = torch.arange(1, self.nbytes // size + 1, dtype=torch.float64)
        return {
            name: number[e["data_offsets"][0] // size : e["data_offsets"][1] // size].view(e["shape"])
            for name, e in table.items()
        }

    def _map(self, buffer: int, found: torch.Tensor, doubled: torch.Tensor) -> None:
        """`found`: a slot's part of one buffer after loading; −1 where nothing was written, 0 where zero was."""
        at = (found >= 0).nonzero()
        if not len(at):
            return
        box = tuple(slice(lo, hi + 1) for lo, hi in zip(at.amin(0).tolist(), at.amax(0).tolist(), strict=True))
        scaled = bool((found[box] != doubled[box]).any())
        found = found[box]
        if (found < 0).any():
            raise ValueError("the engine does not fill its slot box by box")
        source = found.flatten().long() - 1
        first = int(source[0])
        if (source < 0).all():
            self._zeros.append((buffer, box))
        elif torch.equal(source, torch.arange(first, first + len(source))):
            self._runs.append(_Run(buffer, box, found.shape, found.contiguous().stride(), first, scaled))
        else:
            index, held = source.clamp(min=0).to(self._device), (source >= 0).to(self._device)
            self._gathers.append(_Gather(buffer, box, found.shape, index, held, scaled))

    def fill(self, pool: Any, slot: int, row: torch.Tensor) -> None:
        """Put an adapter (`row`: its elements, one dimension, on the host) into a slot of the engine's pool."""
        if slot not in self._views:
            held = [b[slot] for b in _buffers(pool)]
            groups = ([(r.buffer, r.box) for r in self._runs], [(g.buffer, g.box) for g in self._gathers])
            self._views[slot] = tuple([held[b][box] for b, box in group] for group in (self._zeros, *groups))
        zeros, runs, gathers = self._views[slot]
        row = row.to(self._device, non_blocking=True)  # with an accelerator one transfer, then copies inside of it
        base = int(row.storage_offset())
        if zeros:
            torch._foreach_zero_(zeros)
        if runs:
            torch._foreach_copy_(runs, [self._weight(row, base, r) for r in self._runs])
        for target, g in zip(gathers, self._gathers, strict=True):
            weight = torch.where(g.held, row.index_select(0, g.index), 0).view(g.shape)
            target.copy_(weight * self.scaling if g.scaled else weight)

    def _weight(self, row: torch.Tensor, base: int, run: _Run) -> torch.Tensor:
        view = row.as_strided(run.shape, run.strides, base + run.first)
        return view * self.scaling if run.scaled else view


def _probe(manager: Any, config: Any, tensors: Mapping[str, torch.Tensor], scaling: float) -> list[torch.Tensor]:
    """What SGLang puts in a slot for these tensors: one float64 tensor a buffer."""
    from sglang.srt.lora.lora import LoRAAdapter

    adapter = LoRAAdapter(
        _PROBE,
        config,
        manager.base_hf_config,
        manager.load_config,
        manager.lora_backend,
        base_model=manager.base_model,
    )
    adapter.initialize_weights_from_tensors(dict(tensors))
    adapter.scaling = scaling
    pool = copy.copy(manager.memory_pool)
    pool.pin_memory_available = False
    for kind in _BUFFERS:
        shadow = {}
        for name, held in getattr(pool, kind).items():
            one = [t.new_full((1, *t.shape[1:]), -1, dtype=torch.float64, device="cpu") for t in _listed(held)]
            shadow[name] = one if isinstance(held, list) else one[0]
        setattr(pool, kind, shadow)
    modules = manager.lora_modules, manager.embed_tokens_module, manager.lm_head_module
    pool.load_lora_weight_to_buffer(_PROBE, 0, adapter, *modules)
    return [b[0] for b in _buffers(pool)]


def _buffers(pool: Any) -> Iterator[torch.Tensor]:
    """All buffers of a pool, [slots, ...] each, always in the same order."""
    for kind in _BUFFERS:
        for held in getattr(pool, kind).values():
            yield from _listed(held)


def _listed(held: Any) -> list[torch.Tensor]:
    return held if isinstance(held, list) else [held]
