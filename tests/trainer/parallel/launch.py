"""Starts the processes of a layout, as torchrun does, and waits for all of them."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence


class RankFailed(Exception):
    """A process ended with an error; the others were ended too."""


def launch(module: str, arguments: Sequence[str], *, processes: int, out: pathlib.Path, timeout: float = 400) -> None:
    """Run `python -m module arguments` in each process; raises RankFailed with the end of a failed one's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [out / f"{rank}.log" for rank in range(processes)]
    children = []
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
        with log.open("wb") as output:
            children.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + timeout
    try:
        while any(child.poll() is None for child in children):
            failed = [i for i, child in enumerate(children) if child.poll()]
            if failed or time.monotonic() > deadline:
                tails = "\n".join(f"-- rank {i}\n{logs[i].read_text()[-3000:]}" for i in failed or range(processes))
                raise RankFailed(f"{module}: expected every rank to end well within {timeout} s, found\n{tails}")
            time.sleep(0.1)
        failed = [i for i, child in enumerate(children) if child.returncode]
        if failed:
            raise RankFailed("\n".join(f"-- rank {i}\n{logs[i].read_text()[-3000:]}" for i in failed))
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
