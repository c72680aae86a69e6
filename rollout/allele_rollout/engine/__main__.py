"""`python -m allele_rollout.engine`: becomes the SGLang server, with the flags this machine needs."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import entry_points

from allele_rollout.engine.launch import EngineSettings, command, environment, plugins
from allele_rollout.engine.plugin import GROUP


def _arguments(argv: list[str]) -> EngineSettings:
    parser = argparse.ArgumentParser(prog="allele_rollout.engine", description=__doc__)
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--port", type=int, default=30000, help="port on 127.0.0.1 (30000)")
    parser.add_argument("--slots", type=int, required=True, help="adapters in one batch, the bare base counted as one")
    parser.add_argument("--max-rank", type=int, required=True, help="largest adapter rank")
    parser.add_argument("--targets", required=True, help="PEFT target modules, comma-separated")
    parser.add_argument("--engine-arg", action="append", default=[], help="passed to SGLang as it is; repeatable")
    a = parser.parse_args(argv)
    extra = tuple(word for arg in a.engine_arg for word in arg.split(" ", 1))
    return EngineSettings(
        base=a.base, port=a.port, slots=a.slots, max_rank=a.max_rank, targets=tuple(a.targets.split(",")), extra=extra
    )


def _has_accelerator() -> bool:
    import torch

    return bool(torch.accelerator.is_available())


def main(argv: list[str]) -> None:
    settings = _arguments(argv)
    accelerator = _has_accelerator()
    missing = set(plugins(accelerator=accelerator)) - {e.name for e in entry_points(group=GROUP)}
    if missing:
        sys.exit(f"engine: expected entry points {sorted(missing)} in group {GROUP}, found none: install allele itself")
    words = command(settings, python=sys.executable, accelerator=accelerator)
    os.execvpe(words[0], words, environment(os.environ, accelerator=accelerator))


if __name__ == "__main__":
    main(sys.argv[1:])
