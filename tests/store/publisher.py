"""Drivers in a process of their own, for tests: each publishes steps of its run, or dies on the way.

publisher.py URL RUN=MEMBER[,MEMBER] ... [--steps N] [--die before-commit|before-append]
"""

from __future__ import annotations

import argparse
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from allele.store import Fact, Index, PopulationStore, delta


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def publish(url: str, run: str, *, members: list[str], steps: int, death: str | None) -> None:
    store = PopulationStore.open(url, namespace="team", population="users")
    writer = store.catalogue.start(run)
    index = Index.load(store.catalogue)
    first = 0 if writer.last_step is None else writer.last_step + 1
    for step in range(first, first + steps):
        ranges = store.write_segment({m: f"{run} {m} {step}".encode() for m in members})
        if death == "before-commit":
            die()
        if death == "before-append":
            delta.commit = die
        facts = [
            Fact.committed(member=m, revision=index.next_revision(m), weights=r, shape="s") for m, r in ranges.items()
        ]
        writer.commit(step, facts)
        index.refresh()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--die", choices=["before-commit", "before-append"])
    arguments = parser.parse_args()
    with ThreadPoolExecutor(len(arguments.runs)) as pool:
        published = [
            pool.submit(
                publish, arguments.url, run, members=members.split(","), steps=arguments.steps, death=arguments.die
            )
            for run, members in (text.split("=") for text in arguments.runs)
        ]
        for future in published:
            future.result()


if __name__ == "__main__":
    main()
