"""The engine as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.rollout.rollout_parts import BASE, TARGETS

SLOTS = 4


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class EngineProcess:
    """The server as the launcher starts it; it can be killed and started again on its port."""

    def __init__(
        self,
        log: Path,
        *,
        base: Path = BASE,
        targets: Sequence[str] = TARGETS,
        extra: Sequence[str] = (),
        python_path: Sequence[str] = (),
    ) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = log
        self.base, self._targets, self._extra = base, targets, extra
        path = [*python_path, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        port = self.url.rsplit(":", 1)[1]
        words = ["--base", str(self.base), "--port", port, "--slots", str(SLOTS + 1), "--max-rank", "8"]
        words += [f"--engine-arg={argument}" for argument in self._extra]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "allele_rollout.engine", *words, "--targets", ",".join(self._targets)],
            stdout=self._log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=self._environ,
        )

    def wait(self, *, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                pytest.fail(f"the engine exited with {self._process.returncode}:\n{self._log.read_text()[-3000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/model_info", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the engine did not answer within {seconds} s:\n{self._log.read_text()[-3000:]}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def running(self) -> int:
        """Requests that it computes or keeps waiting now."""
        with urllib.request.urlopen(f"{self.url}/v1/loads", timeout=60) as answer:
            (load,) = json.load(answer)["loads"]
        return int(load["num_running_reqs"]) + int(load["num_waiting_reqs"])

    def until_running(self, wanted: Callable[[int], bool], *, seconds: float = 60) -> None:
        """Look again and again; a deadline that no machine needs."""
        deadline = time.monotonic() + seconds
        while not wanted(found := self.running()):
            assert time.monotonic() < deadline, f"after {seconds:g} s the engine has {found} requests"

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
