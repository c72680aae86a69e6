"""Command line and environment of the SGLang server: pure, so that flags can be tested without starting one.

The server binds to localhost only; the gateway beside it is the only way in.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from allele_rollout.engine import cpu, guard
from allele_rollout.engine.bulk import plugin as bulk

CPU_PATH = Path(__file__).parent / "cpu_path"
"""Holds the stand-in `sgl_kernel`; on PYTHONPATH only where there is no accelerator."""

CPU_FLAGS = (
    ("--device", "cpu"),
    ("--dtype", "float32"),  # `auto` casts fp32 checkpoints to fp16, and then nothing matches the trainer
    ("--attention-backend", "torch_native"),
    ("--sampling-backend", "pytorch"),
    ("--lora-backend", "torch_native"),  # the others need Triton
    ("--mem-fraction-static", "0.5"),
    ("--max-total-tokens", "32768"),
    ("--max-running-requests", "1024"),
    ("--cuda-graph-backend-decode", "disabled"),
    ("--cuda-graph-backend-prefill", "disabled"),
    ("--disable-overlap-schedule",),
    ("--skip-server-warmup",),
)


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What one server holds."""

    base: str
    """Folder of the base model, in Hugging Face form."""
    port: int
    slots: int
    """Adapters in one batch; requests without an adapter take one slot too."""
    max_rank: int
    targets: tuple[str, ...]
    """Names of PEFT target modules."""
    extra: tuple[str, ...] = ()
    """Arguments passed to SGLang as they are; they come last, so they win."""


def plugins(*, accelerator: bool) -> tuple[str, ...]:
    """Entry points that the server must load."""
    everywhere = (guard.PLUGIN, bulk.PLUGIN)
    return everywhere if accelerator else (*everywhere, cpu.PLUGIN)


def command(settings: EngineSettings, *, python: str, accelerator: bool) -> list[str]:
    """argv of the server."""
    flags = [
        ("--model-path", settings.base),
        ("--host", "127.0.0.1"),
        ("--port", str(settings.port)),
        ("--enable-lora",),
        ("--max-loras-per-batch", str(settings.slots)),
        ("--max-lora-rank", str(settings.max_rank)),
        ("--lora-target-modules", *settings.targets),
        ("--log-level", "warning"),
        ("--sleep-on-idle",),
        *(() if accelerator else CPU_FLAGS),
    ]
    return [python, "-m", "sglang.launch_server", *(word for flag in flags for word in flag), *settings.extra]


def environment(environ: Mapping[str, str], *, accelerator: bool) -> dict[str, str]:
    """Variables of the server: never the network for weights, and on CPU the stand-in kernel and our plugin."""
    env = {**environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    path = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p) != CPU_PATH]
    if not accelerator:
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        env.setdefault("OMP_NUM_THREADS", "1")
        path.append(str(CPU_PATH))
    if env.get("SGLANG_PLUGINS"):  # a list of the only plugins to load
        env["SGLANG_PLUGINS"] = ",".join((env["SGLANG_PLUGINS"], *plugins(accelerator=accelerator)))
    if path:
        env["PYTHONPATH"] = os.pathsep.join(path)
    else:
        env.pop("PYTHONPATH", None)
    return env
