"""The same event again is dropped for a while; one whose numbers change with each step counts as the same."""

from __future__ import annotations

from typing import Any

import pytest

from allele_operator.cluster.events import EventRecorder

RUN = {"metadata": {"name": "run", "namespace": "team", "uid": "1"}}


class Taking:
    """Takes every new event, as an API server does."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    async def create(self, body: dict[str, Any]) -> dict[str, Any]:
        self.notes.append(body["note"])
        return body


@pytest.mark.parametrize(("flickers", "expected"), [(False, ["0", "1", "2", "9"]), (True, ["0", "9"])])
async def test_one_that_flickers_is_told_once_in_a_while(flickers: bool, expected: list[str]) -> None:
    server, now = Taking(), 0.0
    recorder = EventRecorder(server, instance="me", quiet=600, clock=lambda: now)  # type: ignore[arg-type]

    async def record(message: str) -> None:
        await recorder.record(
            "RLRun", RUN, type="Warning", reason="Gap", message=message, action="Reconcile", flickers=flickers
        )

    for message in ("0", "1", "1", "2"):
        await record(message)
    now = 601.0
    await record("9")
    assert server.notes == expected
