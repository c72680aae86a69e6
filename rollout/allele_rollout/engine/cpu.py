"""SGLang plugin that lets its LoRA code run on a machine without an accelerator.

It pokes private names, so SGLang is pinned exactly. Without it the first adapter fails with an
error about pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from allele_rollout.engine.plugin import applied_once

PLUGIN = "allele_cpu"


class Unpinned:
    """The `torch` module as SGLang's LoRA modules see it: factories ignore `pin_memory`.

    A proxy for those modules only: patching torch itself breaks `torch.device(...)` contexts elsewhere, silently.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        for name in ("tensor", "zeros", "empty", "arange"):
            setattr(self, name, _without_pin_memory(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


def _without_pin_memory(factory: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def register() -> None:
    """Entry point. A no-op with an accelerator and when called again."""
    import torch

    if not torch.accelerator.is_available():
        applied_once(PLUGIN, lambda: _apply(torch))


def _apply(torch: Any) -> None:
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend
    from sglang.srt.mem_cache.pool_host import common

    unpinned = Unpinned(torch)
    _replace(layers, "torch", unpinned)
    _replace(torch_backend, "torch", unpinned)
    _replace(torch.Tensor, "pin_memory", lambda self, *_args, **_kwargs: self)

    def pageable(dims: Any, dtype: Any, device: Any, **_: Any) -> Any:
        return torch.empty(dims, dtype=dtype, device=device)

    # The host side of --enable-return-routed-experts.
    common.ALLOC_MEMORY_FUNCS["cpu"] = pageable


def _replace(owner: Any, name: str, value: Any) -> None:
    """setattr that refuses a name SGLang no longer has."""
    getattr(owner, name)
    setattr(owner, name, value)
