"""Ten thousand random kills of writers of the store: `make soak-store`, with `ARGS="--seed N"` to see one run again.

Every population gets operations drawn by the seed and is killed at random writes, some of its successors as well.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.store.conftest import BUCKET, serve
from tests.store.crash import Laboratory, Prepared
from tests.store.proxy import Proxy
from tests.store.scenarios import BEFORE, Death, some

KILLS_OF_ONE = 40
"""Kills of one population's operations before the next are drawn."""

AT_ONCE = 4


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.store.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=240.0, help="stop then at the latest (default: 240)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    begun, kills, failures = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as root, serve(Path(root)) as server, Proxy.start(server.environ) as proxy:
        laboratory = Laboratory(server.environ, server.root, proxy, bucket=BUCKET)
        for seed in itertools.count(arguments.seed):
            prepared = laboratory.prepare(some(seed), before=BEFORE)
            deaths = draw(seed, prepared)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                outcomes = [(d, pool.submit(laboratory.kill, prepared, d)) for d in deaths]
            for death, outcome in outcomes:
                if error := outcome.exception():
                    failures += 1
                    print(f"seed {seed}, {[o.__name__ for o in prepared.operations]}, {death}: {error!r}", flush=True)
            kills += sum(len(d) for d in deaths)
            minutes = (time.monotonic() - begun) / 60
            print(f"{kills} kills, {failures} failures, {minutes:.1f} minutes", flush=True)
            if kills >= arguments.kills or minutes >= arguments.minutes:
                break
    return 1 if failures else 0


def draw(seed: int, prepared: Prepared) -> list[tuple[Death, ...]]:
    """One death, or up to three in a row."""
    drawn = random.Random(seed)

    def death() -> Death:
        return Death(drawn.randint(1, max(1, prepared.writes)), drawn.random() < 0.5)

    rows: list[tuple[Death, ...]] = []
    while sum(map(len, rows)) < KILLS_OF_ONE:
        rows.append(tuple(death() for _ in range(drawn.choice((1, 1, 2, 3)))))
    return rows


if __name__ == "__main__":
    sys.exit(main())
