"""Finding an environment's class and checking it before the run starts.

A mistake in a dotted path or a signature would otherwise show as thousands of dropped samples.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Collection
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from allele_driver.environments import Environment, Tokenizer

GROUP = "allele.environments"
EXPECTED = {
    "prompts": "prompts(self, member, rng, n, held_out) -> list[Prompt | str]",
    "score": "score(self, member, prompt, completion) -> Score | float",
}
"""What every class has."""

FURTHER = {
    "answers": "answers(self, member, rng, n) -> list[Answer]",
    "pairs": "pairs(self, member, rng, n) -> list[Pair]",
    "teach": "teach(self, member, prompt, completion) -> Lesson",
}
"""What some algorithms need."""


class EnvironmentLoadError(Exception):
    """The environment cannot be used: the message names path, module and what was expected."""


def load_class(path: str, methods: Collection[str] = ()) -> type[Any]:
    """The class at `module:Class`, or of an entry point, with `methods` too. Raises EnvironmentLoadError."""
    target = path if ":" in path else _entry_point(path)
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as e:
        raise EnvironmentLoadError(
            f"environment {path!r}: expected an importable module {module_name!r} on the run's code path, "
            f"found {type(e).__name__}: {e}"
        ) from e
    found = getattr(module, class_name, None)
    where = f"environment {path!r}: module {module_name!r} ({getattr(module, '__file__', 'built in')})"
    if not inspect.isclass(found):
        raise EnvironmentLoadError(f"{where}: expected a class {class_name!r}, found {type(found).__name__}")
    for method, expected in (EXPECTED | {m: FURTHER[m] for m in methods}).items():
        _check(getattr(found, method, None), where=where, name=f"{class_name}.{method}", expected=expected)
    return found


def build(path: str, tokenizer: Tokenizer, parameters: dict[str, Any], *, methods: Collection[str] = ()) -> Environment:
    """`Class(tokenizer=…, **parameters)`. Raises EnvironmentLoadError, also for whatever the constructor raises."""
    found = load_class(path, methods)
    try:
        made: Environment = found(tokenizer=tokenizer, **parameters)
    except Exception as e:
        raise EnvironmentLoadError(
            f"environment {path!r}: expected {found.__module__}.{found.__name__}(tokenizer=…, **parameters) to accept "
            f"parameters {sorted(parameters)}, found {type(e).__name__}: {e}"
        ) from e
    return made


def code_digest(path: str) -> str:
    """sha256 of the source file that defines the class: which code gave the rewards."""
    source = inspect.getsourcefile(load_class(path))
    return f"sha256:{hashlib.sha256(Path(source).read_bytes()).hexdigest()}" if source else ""


def data_digest(environment: object, path: str) -> str:
    """What an environment says of the data that it draws from. Raises EnvironmentLoadError when that is no text."""
    found = getattr(environment, "data_digest", "")
    if not isinstance(found, str):
        raise EnvironmentLoadError(f"environment {path!r}: data_digest: expected text, found {found!r:.200}")
    return found


def _entry_point(name: str) -> str:
    known = {e.name: e.value for e in entry_points(group=GROUP)}
    if name not in known:
        raise EnvironmentLoadError(
            f"environment {name!r}: expected module:Class or an entry point of group {GROUP!r}: one of {sorted(known)}"
        )
    return known[name]


def _check(method: object, *, where: str, name: str, expected: str) -> None:
    """That the method can be called with the protocol's arguments by position."""
    if not callable(method):
        raise EnvironmentLoadError(f"{where}: expected {expected}, found no method {name}")
    if inspect.iscoroutinefunction(method):
        raise EnvironmentLoadError(f"{where}: expected {expected}, found an async method {name}")
    arguments = expected[expected.index("(") + 1 : expected.index(")")].split(", ")
    signature = inspect.signature(method)
    try:
        signature.bind(*arguments)
    except TypeError as e:
        raise EnvironmentLoadError(f"{where}: expected {expected}, found {name}{signature}: {e}") from e
