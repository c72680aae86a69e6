"""SGLang to which adapters come slowly: it waits where it reads their bytes, in its scheduler.

A tiny adapter on a tmpfs is read at once; a real one from a disk, a network file system or a hub is not. Run in place
of `sglang.launch_server`; each process of the server imports this module.
"""

from __future__ import annotations

import os
import runpy
import time
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

DELAY = "ALLELE_BENCH_DELAY"
"""Variable: seconds."""


def slowly(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    time.sleep(float(os.environ[DELAY]))
    return original(*args, **kwargs)


HookRegistry.register("sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter", slowly, HookType.AROUND)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
