"""What Megatron-core 0.16 needs to run where there is no CUDA, one named patch each.

Megatron asks for the current CUDA device when it makes buffers, and keeps random states, a copy stream and a token
count on CUDA. With CUDA present nothing here is called.
"""

from __future__ import annotations

import importlib.metadata
import types
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


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
    patch_synchronize()
    patch_random_states()
    patch_schedules()
    patch_dispatcher()


def patch_current_device() -> None:
    """Buffers that Megatron makes on `torch.cuda.current_device()` are made on the CPU."""
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]


def patch_synchronize() -> None:
    """Pipeline stages wait for CUDA after they exchanged shapes; there is nothing to wait for."""
    torch.cuda.synchronize = _nothing


def patch_random_states() -> None:
    """Activation recompute restores the random states of the CPU and of CUDA; the second is absent."""
    megatron_random._get_cuda_rng_state = _cpu_random_state
    megatron_random._set_cuda_rng_state = _nothing


def patch_schedules() -> None:
    """The schedules count tokens in a tensor with `device="cuda"`: there, the name `torch` makes it on the CPU."""
    schedules.torch = _TorchOnCpu("torch")


def patch_dispatcher() -> None:
    """Token counts are copied to the host on a side stream; on the CPU they only change their type."""
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _splits_as_numbers


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _cpu_random_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


class _TorchOnCpu(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("zeros", "ones", "empty", "tensor"):
            return found

        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            made: torch.Tensor = found(*args, **kwargs)
            return made

        return make


def _splits_as_numbers(dispatcher: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> Any:
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            value = getattr(dispatcher, name)
            if torch.is_tensor(value):
                setattr(dispatcher, name, value.numpy())
    return tokens_per_expert
