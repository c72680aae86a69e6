"""Reports never hold up a run: a slow, refusing or absent receiver only costs freshness."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path

import aiohttp
import pytest

from allele.store import Fact
from allele_driver import report
from allele_driver.loop.tally import Tally
from allele_driver.report import Reporter
from tests.driver.driver_parts import ProgressServer, bundle, free_port


def tally() -> Tally:
    return Tally(bundle("p", uid="uid", members=2, steps=10), members=2)


async def test_only_the_newest_state_matters(tmp_path: Path) -> None:
    server, told = ProgressServer(), tally()
    token = tmp_path / "token"
    token.write_text("t")
    async with aiohttp.ClientSession() as session:
        reporter = Reporter(server.url, token, session=session)
        reporter.start()
        for told.step in range(1, 6):
            reporter.report(told.progress())
        await reporter.close()
    server.close()
    assert server.reports[-1].step == 5
    assert server.tokens[-1] == "Bearer t"


async def test_an_absent_receiver_stalls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LAST_WORDS_SECONDS", 0.2)
    told = tally()
    async with aiohttp.ClientSession() as session:
        reporter = Reporter(f"http://127.0.0.1:{free_port()}", None, session=session)
        reporter.start()
        began = time.monotonic()
        for _ in range(1000):
            reporter.report(told.progress())
            await asyncio.sleep(0)
        assert time.monotonic() - began < 5
        await reporter.close()


async def test_a_missing_token_file_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RETRY_SECONDS", 0.05)
    server, token = ProgressServer(), tmp_path / "token"
    async with aiohttp.ClientSession() as session:
        reporter = Reporter(server.url, token, session=session)
        reporter.start()
        reporter.report(tally().progress())
        await asyncio.sleep(0.1)
        assert not server.reports
        token.write_text("late")
        await reporter.close()
    server.close()
    assert server.tokens == ["Bearer late"]


def test_progress_is_bounded_and_estimates_the_rest() -> None:
    told = tally()
    told.phase, told.step = "Training", 4
    told.durations.extend([1.0, 3.0])
    told.failed = {f"m-{i}": "x" * 2000 for i in range(50)}
    told.message = "y" * 5000
    told.rewards = {"a": 0.25, "b": 0.75}
    found = told.progress()
    assert found.eta_seconds == 12
    assert found.reward is not None and (found.reward.mean, found.reward.best, found.reward.worst) == (0.5, 0.75, 0.25)
    assert len(found.failed_members) == 16
    assert len(found.model_dump_json()) < 16_000


def test_a_revision_that_a_collection_says_again_counts_once() -> None:
    told = tally()
    first = Fact(kind="Committed", member="m", revision=1, step=1, run="uid", segment="old")
    moved = dataclasses.replace(first, segment="new")
    told.count([first, Fact(kind="Committed", member="m", revision=2, step=2, run="uid"), moved])
    told.count([Fact(kind="Committed", member="n", revision=1, step=1, run="another")])
    assert told.progress().committed == 2
