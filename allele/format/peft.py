"""PEFT folders: `adapter_model.safetensors` beside `adapter_config.json`, out of a packed adapter and back.

Export is a plain copy, since a packed adapter already is PEFT's file. Import takes tensors in any order but refuses
whatever would be silently lost: other names, shapes, dtypes, or a config that changes what the numbers mean.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allele.format import header
from allele.format.errors import ShapeMismatch
from allele.format.shape import AdapterShape

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")
"""Set in a PEFT config, each of these makes the same tensors mean something else than B·A·x·scale."""


def adapter_config(shape: AdapterShape, *, scale: float, base_name: str) -> dict[str, Any]:
    """PEFT's adapter_config.json for an adapter that is multiplied by `scale`.

    Always as lora_alpha / r: engines read `use_rslora` or not (SGLang 0.5 does not), and a scale that two readers
    understand differently is an adapter of another strength.
    """
    alpha = scale * shape.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": shape.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": False,
        "target_modules": list(shape.targets),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def export_peft(packed: Any, directory: str | Path, *, shape: AdapterShape, scale: float, base_name: str) -> Path:
    """Write a folder that PEFT, SGLang and vLLM load. Raises ShapeMismatch when `packed` is of another shape."""
    shape.unpack(packed)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(packed)
    config = adapter_config(shape, scale=scale, base_name=base_name)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def import_peft(directory: str | Path, shape: AdapterShape) -> memoryview:
    """The row (`shape.nbytes` bytes in `shape.dtype`) of a PEFT folder, whatever its tensors' order.

    Raises ShapeMismatch naming tensor, expected and found, and FileNotFoundError without a safetensors file.
    """
    folder = Path(directory)
    _check_config(folder / CONFIG, shape)
    row = memoryview(bytearray(shape.nbytes))
    with (folder / WEIGHTS).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = memoryview(mapped)
        try:
            _copy_tensors(data, row=row, shape=shape, what=WEIGHTS)
        finally:
            data.release()
    return row.toreadonly()


def _copy_tensors(data: memoryview, *, row: memoryview, shape: AdapterShape, what: str) -> None:
    found, start = header.parse(data, what)
    header.compare(shape.entries, found, what)
    for e in shape.entries:
        f = found[e.name]
        if start + f.end > data.nbytes:
            raise ShapeMismatch(e.name, expected=f"{f.end} bytes of data", found=f"{data.nbytes - start} (truncated)")
        row[e.start : e.end] = data[start + f.start : start + f.end]


def _check_config(path: Path, shape: AdapterShape) -> None:
    if not path.exists():
        return
    config: Mapping[str, Any] = json.loads(path.read_text())
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ShapeMismatch(f"{CONFIG} {key}", expected="unset", found=repr(config[key]))
    if config.get("r", shape.rank) != shape.rank:
        raise ShapeMismatch(f"{CONFIG} r", expected=shape.rank, found=config["r"])
