"""`allele simulate residency`: a row for each way to deal with cold adapters, or one line that says what was wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from allele_cli.main import main


def run(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["allele", "simulate", "residency", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_log_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.csv"
    log.write_text("time,member\n" + "".join(f"{i / 10},m{i % 7}\n" for i in range(200)))
    assert run(monkeypatch, log, "--set", "settle=5", "--set", "warm=4", "-o", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in rows] == ["off", "admission", "two-phase"]
    assert {row["requests"] for row in rows} == {150}
    assert all(row["refused"] > 0 for row in rows), "four in memory, all in use"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--set", "slot=3"], "--set slot: expected one of slots, warm"),
        (["--set", "slots=0"], "slots: expected at least 1, found 0"),
        (["--set", "slots=1.5"], "slots: expected a whole number, found 1.5"),
        (["--set", "share=0"], "share: expected more than 0"),
        (["--set", "step=fast"], "--set step=fast: expected NAME=VALUE with a number"),
        (["--set", "step=nan"], "--set step=nan: expected a finite number"),
        (["{log}"], "row 2: expected time,member, found 'm3'"),
        (["missing.csv"], "missing.csv"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "log.csv"
    log.write_text("time,member\nm3\n")
    assert run(monkeypatch, *(a.format(log=log) for a in args)) == 1
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
