"""LoRA folders as others write them, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy


def save(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """A PEFT folder; of rank 4 and scale 2, unless `config` says otherwise."""
    folder.mkdir(parents=True)
    copies = {name: np.ascontiguousarray(a) for name, a in tensors.items()}  # the library ignores strides
    safetensors.numpy.save_file(copies, folder / "adapter_model.safetensors")
    text = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config)
    (folder / "adapter_config.json").write_text(text)
    return folder


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 whose low 16 bits are zero: what BF16 holds."""
    return (values.astype("<f4").view("<u4") & 0xFFFF0000).view("<f4")


def save_bf16(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """`tensors` hold BF16's bits as uint16; numpy has no name for the dtype, so the header is edited."""
    save(folder, tensors, **config)
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].replace(b'"U16"', b'"BF16"')
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return folder
