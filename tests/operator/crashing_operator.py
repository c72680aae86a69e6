"""The operator, killed with SIGKILL right after the answer to its k-th write came: CRASH_AFTER=k."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from allele_operator.app import main
from allele_operator.cluster.kinds import Obj
from allele_operator.cluster.transport import Request, Transport
from allele_operator.settings import Settings

CRASH_AFTER = int(os.environ["CRASH_AFTER"])


class Crashing(Transport):
    writes = 0

    async def call(self, request: Request) -> Obj:
        answer = await super().call(request)
        if request.writes:
            Crashing.writes += 1
            print(f"write {Crashing.writes}: {request.method} {request.path}", flush=True)
            if Crashing.writes == CRASH_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
        return answer


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Settings.load(sys.argv[1:]), make_transport=Crashing)))
