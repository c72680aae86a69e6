"""Engines to time: SGLang as the launcher starts it, and the bare one with only what this machine needs to run it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

import torch

from allele.format import AdapterShape
from allele_rollout.engine import cpu
from allele_rollout.engine.launch import EngineSettings, command, environment
from bench.rollout import slow

ROOT = pathlib.Path(__file__).parent.parent.parent
BASE = ROOT / "examples/preferences/base"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = AdapterShape.from_model(json.loads((BASE / "config.json").read_text()), rank=8, targets=TARGETS)
PROMPT = (13, 4, 6, 3, 5, 2)


@contextlib.contextmanager
def engine(*, slots: int, bare: bool, delay: float = 0.0) -> Iterator[str]:
    """URL of an engine with `slots` adapters beside the base in a batch; `bare`: without our plugins.

    Without an accelerator the bare one keeps the plugin that lets SGLang run there at all. `delay`: seconds that it
    waits when it reads an adapter.
    """
    accelerator = torch.accelerator.is_available()
    port = free_port()
    settings = EngineSettings(base=str(BASE), port=port, slots=slots + 1, max_rank=SHAPE.rank, targets=TARGETS)
    environ = environment(os.environ, accelerator=accelerator)
    if bare:
        environ["SGLANG_PLUGINS"] = "none" if accelerator else cpu.PLUGIN
    words = command(settings, python=sys.executable, accelerator=accelerator)
    if delay:
        words[words.index("sglang.launch_server")] = slow.__name__
        environ[slow.DELAY] = str(delay)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environ, cwd=ROOT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, pathlib.Path(log.name))
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/model_info", timeout=5):
            return
        time.sleep(0.5)
    raise SystemExit(f"the engine did not start:\n{log.read_text()[-3000:]}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
