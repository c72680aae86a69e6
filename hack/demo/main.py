"""`make demo`, after hack/demo.sh has set up: trains the example and ends with table, plot and summary."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parent.parent.parent),
    str(Path(__file__).parent.parent.parent / "examples/preferences"),
]

from allele.protocol.errors import ProtocolError  # noqa: E402 (the checkout is not installed as a package)
from allele_cli.failure import Failure  # noqa: E402
from hack.demo.summary import Seconds  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Example: hack/demo/main.py --mode local")
    parser.add_argument("--mode", choices=("cluster", "local"), required=True)
    parser.add_argument("--cluster", choices=("local", "existing"), default="local")
    parser.add_argument("--setup-seconds", type=float, default=0, help="what the environment took")
    parser.add_argument("--cluster-seconds", type=float, default=0, help="what cluster and images took")
    args = parser.parse_args()
    seconds = Seconds(setup=args.setup_seconds, cluster=args.cluster_seconds)
    try:
        if args.mode == "cluster":
            from hack.demo.cluster import demo

            demo(existing=args.cluster == "existing", seconds=seconds)
        else:
            from hack.demo.local import demo as local_demo

            local_demo(seconds=seconds)
    except (Failure, ProtocolError) as e:
        sys.exit(f"demo: {e}")


if __name__ == "__main__":
    main()
