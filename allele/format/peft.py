"""PEFT folders: `adapter_model.safetensors` beside `adapter_config.json`, out of a packed adapter.

A plain copy, since a packed adapter already is PEFT's file. `allele.format.importing` is the way back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from allele.format.lora_config import CONFIG
from allele.format.shape import AdapterShape

WEIGHTS = "adapter_model.safetensors"


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
