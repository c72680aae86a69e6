"""Starts the processes of a layout, as torchrun does, and waits for all of them.

Most of such a process's time is importing torch and Megatron. So one process imports the module and forks the ranks,
before anything of torch runs in it: `python -m tests.trainer.parallel.launch MODULE PROCESSES OUT ARGUMENTS…`.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence


class RankFailed(Exception):
    """A process ended with an error, or none ended in time; all were ended."""


def launch(module: str, arguments: Sequence[str], *, processes: int, out: pathlib.Path, timeout: float = 400) -> None:
    """Run the module's `main` in each process; raises RankFailed with the ends of their output."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, module, str(processes), str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (out / "launch.log").open("wb") as log:
        parent = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            failed = parent.wait(timeout) != 0
        except subprocess.TimeoutExpired:
            failed = True
        finally:
            if parent.poll() is None:
                os.killpg(parent.pid, 9)
                parent.wait()
    if failed:
        logs = [out / "launch.log", *(_log(out, rank) for rank in range(processes))]
        tails = "\n".join(f"-- {log.name}\n{log.read_text()[-3000:]}" for log in logs if log.exists())
        raise RankFailed(f"{module}: expected every rank to end well within {timeout} s, found\n{tails}")


def fork(module: str, processes: int, out: pathlib.Path) -> int:
    """Run `main` of the module as each rank; gives 0 when all ended well, and leaves none behind."""
    run = importlib.import_module(module).main
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            _be(rank, run, out)
        ranks[child] = rank
    while ranks:
        child, status = os.wait()
        del ranks[child]
        if status:
            for other in ranks:
                os.kill(other, 9)
            return 1
    return 0


def _be(rank: int, run: object, out: pathlib.Path) -> None:
    """The rest of this process's life; it must not return into the code of its parent."""
    code = 1
    try:
        log = os.open(_log(out, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        assert callable(run)
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _log(out: pathlib.Path, rank: int) -> pathlib.Path:
    return out / f"{rank}.log"


if __name__ == "__main__":
    name, count, folder, *rest = sys.argv[1:]
    sys.argv = [name, *rest]
    sys.exit(fork(name, int(count), pathlib.Path(folder)))
