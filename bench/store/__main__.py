"""Time the store: bytes of many adapters, commits, the index, and one custom resource per adapter in its place."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from bench.report import Report
from bench.store import adapters, catalogue, places

EXAMPLE = """example:
  python -m bench.store --publish 1024 --load 256 --index 1000,10000 --history 1000 --objects 0"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.store", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",") if int(n)]

    parser.add_argument("--publish", type=int, default=4096, help="adapters of a step (default: 4096)")
    parser.add_argument("--load", type=int, default=1024, help="adapters loaded cold (default: 1024)")
    parser.add_argument("--commits", type=int, default=200, help="commits that are timed (default: 200)")
    parser.add_argument("--committed", type=int, default=256, help="members of each (default: 256)")
    parser.add_argument(
        "--index", type=numbers, default=[10**3, 10**4, 10**5, 10**6], help="members (default: 10^3 to 10^6)"
    )
    parser.add_argument("--history", type=int, default=100_000, help="commits of history, on files (default: 100000)")
    parser.add_argument(
        "--objects",
        type=numbers,
        default=[10**3, 10**4],
        help="custom resources in the cluster of KUBECONFIG; 0: none (default: 1000,10000)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ours; the best counts (default: 3)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"), help="folder of the JSON")
    return parser


def main() -> None:
    args = arguments().parse_args()
    report = Report("store", {k: v for k, v in vars(args).items() if k != "out"} | {"time": "wall seconds"})
    with places.files() as folder, places.s3() as server:
        for place in (folder, server):
            _say(f"publish and load on {place.name}")
            store = adapters.publish(report, place, members=args.publish, rounds=args.rounds)
            adapters.cold_load(report, place, store, members=args.load, rounds=args.rounds)
            _say(f"commits on {place.name}")
            catalogue.commits(report, place, count=args.commits, members=args.committed)
        _say("many tensors")
        adapters.many_tensors(report, rounds=args.rounds)
        for members in args.index:
            _say(f"index of {members}")
            for place in (folder, server):
                catalogue.index(report, place, members=members)
        if args.history:
            _say(f"{args.history} commits of history")
            catalogue.long_history(report, folder, commits=args.history)
    for members in args.objects:
        _say(f"{members} custom resources")
        catalogue.custom_resources(report, ["kubectl", "--kubeconfig", os.environ["KUBECONFIG"]], members=members)
    report.finish(args.out)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
