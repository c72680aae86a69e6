"""The engine as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
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

    def __init__(self, log: Path, *, python_path: Sequence[str] = (), slots: int = SLOTS) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = log
        self._slots = slots
        path = [*python_path, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        port = self.url.rsplit(":", 1)[1]
        words = ["--base", str(BASE), "--port", port, "--slots", str(self._slots + 1), "--max-rank", "8"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "allele_rollout.engine", *words, "--targets", ",".join(TARGETS)],
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

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
