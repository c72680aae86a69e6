"""Probe of a store: can this process reach it, and does it do what commits rely on?

`python -m allele.store.capability --store URL [--termination-log PATH]` prints the result as JSON and exits 1 with a
reason when something is missing. What is written lies below `.allele-probe/` and is removed again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from allele.store.address import FORMS, Address
from allele.store.capability.found import Capabilities, Failed, Found, Latency, Reason

__all__ = ["Capabilities", "Latency", "Reason", "main", "probe"]

_MAX_MESSAGE = 1024
"""Characters of a termination message that the operator copies."""


def probe(url: str, environ: Mapping[str, str] = os.environ) -> Capabilities:
    """Never raises for what a store does; raises InvalidRequest for a URL that names none."""
    address, found = Address.parse(url), Found()
    try:
        _look(address, environ, found)
        found.require()
    except Failed as e:
        return found.result(reachable=False, reason=e.reason, message=f"{url}: {e}"[:_MAX_MESSAGE])
    return found.result(reachable=True, reason="Reachable", message=f"{url}: all that commits rely on works")


def _look(address: Address, environ: Mapping[str, str], found: Found) -> None:
    """Each provider's library is loaded where it is needed, and only there."""
    if address.scheme == "file":
        from allele.store.capability import folder

        folder.look(Path("/" + address.prefix), found)
    elif address.scheme == "s3":
        from allele.store.capability import rounds, s3

        rounds.look(s3.S3Client.open(address.bucket, environ), address.prefix, found)
    else:
        from allele.store.capability import clouds, rounds

        rounds.look(clouds.CloudClient.open(address, environ), address.prefix, found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m allele.store.capability", description="Probe a store.")
    parser.add_argument("--store", required=True, help=FORMS)
    parser.add_argument("--termination-log", type=Path, help="also write the result here, as a pod's last message")
    arguments = parser.parse_args(argv)
    result = probe(arguments.store)
    text = result.model_dump_json()
    print(text)
    if arguments.termination_log is not None:
        arguments.termination_log.write_text(text)
    return 0 if result.reachable else 1
