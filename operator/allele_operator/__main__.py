"""`python -m allele_operator`: see `--help`, or allele_operator.settings."""

from __future__ import annotations

import asyncio
import os
import sys

from pydantic import ValidationError

from allele_operator.app import main
from allele_operator.settings import Settings


def start() -> None:
    try:
        settings = Settings.load(sys.argv[1:])
    except ValidationError as e:
        sys.exit("\n".join(f"{'.'.join(map(str, x['loc'])) or 'settings'}: {x['msg']}" for x in e.errors()))
    code = asyncio.run(main(settings))
    sys.stderr.flush()
    os._exit(code)  # a thread of a library must not keep a process alive that has given up the lease


if __name__ == "__main__":
    start()
