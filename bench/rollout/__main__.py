"""Time a rollout: publishing, sending by adapter, first tokens past the slots, hit ratios, storms of publications."""

from __future__ import annotations

import argparse
import pathlib
import sys

from bench.report import Report
from bench.rollout import first_token, grouping, hits, publish, storm
from bench.rollout.engines import engine

EXAMPLE = """example:
  python -m bench.rollout --only publish,storm --publish 16,256 --seconds 5"""
PARTS = ("publish", "grouping", "first-token", "storm", "hits")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.rollout", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser.add_argument("--only", type=lambda t: t.split(","), default=PARTS, help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--slots", type=int, default=8, help="adapters in a batch (default: 8)")
    parser.add_argument("--publish", type=numbers, default=[16, 256, 1024], help="adapters (default: 16,256,1024)")
    parser.add_argument("--rows", type=int, default=256, help="rows of a batch (default: 256)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer (default: 16)")
    parser.add_argument("--clients", type=int, default=32, help="clients at once (default: 32)")
    parser.add_argument("--seconds", type=float, default=20, help="of traffic for each number (default: 20)")
    parser.add_argument("--delay", type=float, default=0.1, help="seconds until a cold adapter is there (default: 0.1)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts (default: 3)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"), help="folder of the JSON")
    return parser


def main() -> None:
    args = arguments().parse_args()
    if wrong := set(args.only) - set(PARTS):
        sys.exit(f"--only: expected some of {', '.join(PARTS)}, found {', '.join(sorted(wrong))}")
    report = Report("rollout", {k: v for k, v in vars(args).items() if k != "out"} | {"time": "wall seconds"})
    load = {"slots": args.slots, "clients": args.clients, "seconds": args.seconds, "tokens": args.tokens}
    with engine(slots=args.slots, bare=False) as url:
        with engine(slots=args.slots, bare=True) as bare:
            if "publish" in args.only:
                _say("publish")
                publish.measure(report, url, bare, slots=args.slots, counts=args.publish, rounds=args.rounds)
            if "grouping" in args.only:
                _say("by adapter against interleaved")
                shape = {"slots": args.slots, "rows": args.rows, "tokens": args.tokens, "rounds": args.rounds}
                grouping.measure(report, url, bare, **shape)
            if "storm" in args.only:
                _say("publish storm")
                storm.measure(report, url, bare, count=max(args.publish), **load)
        if "first-token" in args.only:
            _say("first tokens")
            with engine(slots=args.slots, bare=True, delay=args.delay) as slow:
                first_token.measure(report, url, slow, delay=args.delay, **load)
    if "hits" in args.only:
        _say("hit ratios")
        hits.measure(report)
    report.finish(args.out)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
