"""What Megatron-core 0.16 needs to run where there is no CUDA, one named patch each.

Megatron asks for the current CUDA device when it makes buffers, and keeps its random states on CUDA. Nothing else is
needed for a dense model with our own packed attention. With CUDA present nothing here is called.
"""

from __future__ import annotations

import importlib.metadata

import torch


class UnsupportedMegatron(Exception):
    """The patches were checked against another version."""


def install() -> None:
    """Apply the patches; applying them twice changes nothing."""
    found = importlib.metadata.version("megatron-core")
    if not found.startswith("0.16."):
        raise UnsupportedMegatron(
            f"megatron-core: expected 0.16.x (the CPU patches were checked with it), found {found}"
        )
    patch_current_device()


def patch_current_device() -> None:
    """Buffers that Megatron makes on `torch.cuda.current_device()` are made on the CPU."""
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]


def _cpu_device() -> torch.device:
    return torch.device("cpu")
