"""Stand-in for the CPU build of sgl_kernel, which no registry ships.

SGLang's CPU paths import these names (speculative decoding, KV moves, AMX operators) but without AMX never call them.
Calling one fails loudly. The launcher puts this folder on PYTHONPATH only where there is no accelerator, so that it
can never stand in front of the real package.
"""

from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build here")

    missing.__name__ = name
    return missing
