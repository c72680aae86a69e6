"""Local processes live as containers do under restartPolicy OnFailure."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from allele_cli.failure import Failure
from allele_cli.local import processes
from allele_cli.local.processes import Process, Spec


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "BACKOFF_SECONDS", (0.0,))


def process(tmp_path: Path, code: str, *, restarts: int = 3) -> Process:
    spec = Spec(name="role", argv=(sys.executable, "-c", code), env=dict(os.environ), restarts=restarts)
    return Process(spec, logs=tmp_path, on_restart=lambda *_: None)


async def test_failing_process_is_started_again_until_it_ends_well(tmp_path: Path) -> None:
    count = tmp_path / "count"
    code = f"import sys; n = open({str(count)!r}, 'a').write('x'); sys.exit(len(open({str(count)!r}).read()) < 3)"
    running = process(tmp_path, code)
    assert await running.run() == 0
    assert running.restarts == 2


async def test_too_many_failures_end_with_the_log(tmp_path: Path) -> None:
    running = process(tmp_path, "import sys; print('why it failed'); sys.exit(1)", restarts=2)
    with pytest.raises(Failure, match=r"exit code 1(?s:.*)why it failed"):
        await running.run()
    assert running.restarts == 2


async def test_invalid_input_is_not_tried_again(tmp_path: Path) -> None:
    running = process(tmp_path, "import sys; sys.exit('wrong') if 0 else sys.exit(2)")
    with pytest.raises(Failure, match="exit code 2"):
        await running.run()
    assert running.restarts == 0


async def test_stopping_ends_what_the_process_started_too(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    task = asyncio.create_task(process(tmp_path, code).run())
    while not (pid.exists() and pid.read_text()):
        await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    child = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        await asyncio.sleep(0.05)
    pytest.fail("the process's child lives on")
