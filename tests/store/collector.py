"""A collector in a process of its own, for tests, that may die between two of its writes.

collector.py URL NOW [--die facts|copy|places|delete|between-deletes]: it dies right after that.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from datetime import datetime
from typing import Any

from allele.store import PopulationStore, collect, facts
from allele.store.retention import Policy

POLICY = Policy(keep_last=1, max_policy_lag=0)


def die_after(real: Callable[..., Any], calls: int = 1) -> Callable[..., Any]:
    """`real`, and then death at its `calls`-th return."""
    left = [calls]

    def run(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("now", type=datetime.fromisoformat)
    parser.add_argument("--die", choices=["facts", "copy", "places", "delete", "between-deletes"])
    arguments = parser.parse_args()
    facts.now = lambda: arguments.now
    store = PopulationStore.open(arguments.url, namespace="team", population="users")
    match arguments.die:
        case "facts":
            collect._commit = die_after(collect._commit)
        case "copy":
            collect._copy = die_after(collect._copy)
        case "places":
            collect._Compaction._move = die_after(collect._Compaction._move)  # type: ignore[method-assign]
        case "between-deletes":
            collect._DELETE_THREADS = 1  # type: ignore[misc]
            store.objects.delete = die_after(store.objects.delete)  # type: ignore[method-assign]
        case "delete":
            collect._delete = die_after(collect._delete)
    collect.collect(store, policy=POLICY, now=arguments.now)


if __name__ == "__main__":
    main()
