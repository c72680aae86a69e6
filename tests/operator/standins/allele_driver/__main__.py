"""Reports a step each 0.2 s until run.json's number of steps, then succeeds. A report that is refused is printed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def argument(flag: str) -> str:
    return sys.argv[sys.argv.index(flag) + 1]


signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
bundle = json.loads((Path(argument("--run-dir")) / "run.json").read_text())
steps = bundle["runSpec"]["stop"]["steps"]
epoch = int(time.time())


def report(step: int, phase: str) -> None:
    body = {
        "namespace": bundle["namespace"],
        "run": bundle["run"],
        "uid": bundle["runUid"],
        "epoch": epoch,
        "phase": phase,
        "step": step,
        "steps": steps,
        "reward": {"mean": step / steps, "best": 1.0, "worst": 0.0},
        "members": 4,
        "trained": 4 if step else 0,
        "committed": 4 * step,
        "exposed": 4 * step,
    }
    token = Path(argument("--report-token-file")).read_text()
    request = urllib.request.Request(
        argument("--report") + "/v1/progress",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    try:
        urllib.request.urlopen(request, timeout=3).read()
    except (urllib.error.URLError, OSError) as e:
        print(f"step {step}: {e}", flush=True)


for step in range(steps + 1):
    report(step, "Training")
    time.sleep(0.2)
report(steps, "Succeeded")
