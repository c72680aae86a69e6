"""What Jobs run on a population's folder: the report that the operator reads, and when trying again helps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allele.protocol.upkeep import CollectionReport, ErasureReport
from allele.store import Fact, PopulationRecord, PopulationStore, jobs
from allele.store.retention import FOLDERS

Committed = Callable[..., Fact]
Damage = Callable[[str, Callable[[bytes], bytes]], None]
MINE = PopulationRecord(uid="uid-1", base_digest="sha256:base", shapes={})
AT_ONCE = ("--keep-last", "1", "--max-policy-lag", "0", "--grace-hours", "0")


@pytest.fixture
def job(
    store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Exit code and report; standard output and the termination log say the same."""

    def run(command: str, *more: str, url: str = store_url) -> tuple[int, dict[str, Any]]:
        log = tmp_path / "termination-log"
        place = ["--store", url, "--namespace", "team", "--population", "users", "--uid", "uid-1"]
        code = jobs.main([command, *place, "--termination-log", str(log), *more])
        assert capsys.readouterr().out.strip() == log.read_text()
        return code, json.loads(log.read_text())

    return run


def train(store: PopulationStore, committed: Committed, steps: int) -> None:
    store.claim(MINE)
    writer = store.catalogue.start("run")
    for step in range(1, steps + 1):
        writer.commit(step, [committed("m", step, data=b"x" * 500)])


def test_erasure_says_how_much_it_deleted(store: PopulationStore, committed: Committed, job: Any) -> None:
    train(store, committed, 2)
    size, objects = sum(o.size for o in store.objects.list()), len(list(store.objects.list()))
    code, report = job("erase")
    found = ErasureReport.model_validate(report)
    assert (code, found.erased, found.reason, found.objects) == (0, True, "Erased", objects)
    assert found.size == pytest.approx(size, abs=1)  # the record with its mark
    assert f"deleted {objects} objects (" in found.message and store.objects.url() in found.message
    assert job("erase") == (0, report | {"reason": "NothingThere", "objects": 0, "size": 0} | nothing(store))


def nothing(store: PopulationStore) -> dict[str, str]:
    return {"message": f"{store.objects.url()}: nothing was there"}


def test_what_is_anothers_is_done_with_and_what_the_store_refuses_is_tried_again(
    store: PopulationStore, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.claim(MINE.model_copy(update={"uid": "uid-2"}))
    code, report = job("erase")
    assert (code, report["erased"], report["reason"]) == (0, True, "OwnedByAnother")
    assert "uid-2" in report["message"]
    store.objects.put("population.json", b"not a record")
    code, report = job("erase")
    assert (code, report["erased"], report["reason"]) == (1, False, "OwnershipError")


def test_wrong_credentials_are_told(s3_environ: Any, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for command, key in (("erase", "erased"), ("collect", "collected")):
        code, report = job(command, url="s3://alleles/x")
        assert (code, report[key], report["reason"]) == (1, False, "StoreRefused"), report


def test_a_pass_collects_by_the_policy_that_it_is_given(store: PopulationStore, committed: Committed, job: Any) -> None:
    assert job("collect")[1]["message"] == "no run has written yet"
    train(store, committed, 5)
    assert job("collect", *AT_ONCE, "--keep-last", "9")[1]["message"] == "nothing was to be done"
    code, report = job("collect", *AT_ONCE)
    found = CollectionReport.model_validate(report)
    assert (code, found.collected, found.retired, found.deleted) == (0, True, 3, 0)
    assert found.message == "retired 3 revisions"
    found = CollectionReport.model_validate(job("collect", *AT_ONCE)[1])
    assert (found.deleted, found.size, found.message) == (3, 1500, "deleted 3 objects (1.5 kB)")
    assert len([o for f in FOLDERS for o in store.objects.list(f)]) == 2


def test_the_state_that_a_run_would_resume_from_is_kept(store: PopulationStore, committed: Committed, job: Any) -> None:
    store.claim(MINE)
    states = [store.write_segments({"m": b"s%d" % i}, "states")["m"] for i in range(4)]
    store.catalogue.start("paused").commit(1, [committed("m", 1, state=states[0], run="paused")])
    writer = store.catalogue.start("run")
    for i in (1, 2, 3):
        writer.commit(i, [committed("m", i + 1, state=states[i], run="run")])
    job("collect", *AT_ONCE, "--run", "paused", "--run", "run")
    assert retired(store) == {2}
    job("collect", *AT_ONCE, "--run", "run")
    assert retired(store) == {1, 2}


def retired(store: PopulationStore) -> set[int | None]:
    return {f.revision for f in store.catalogue.facts() if f.kind == "Retired"}


def test_a_pass_leaves_the_folder_of_another_population_alone(
    store: PopulationStore, committed: Committed, job: Any
) -> None:
    train(store, committed, 5)
    store.claim(MINE.model_copy(update={"uid": "uid-2", "adopt": True}))
    before = store.catalogue.version()
    code, report = job("collect", *AT_ONCE)
    assert (code, report["collected"], report["reason"]) == (0, False, "OwnedByAnother")
    assert "uid-2" in report["message"]
    assert store.catalogue.version() == before


def test_damage_is_told_and_trying_again_would_not_help(
    store: PopulationStore, committed: Committed, job: Any, damage: Damage
) -> None:
    store.claim(MINE)
    places = store.write_segments({m: m.encode() * 900 for m in "abc"})
    facts = [Fact.committed(member=m, revision=1, weights=places[m], shape="s") for m in "abc"]
    writer = store.catalogue.start("run")
    writer.commit(1, facts)
    for step in (2, 3, 4):
        writer.commit(step, [committed(m, step) for m in "ab"])
    damage(f"team/users/{places['c'].path}", lambda data: data[:-1] + b"!")
    job("collect", *AT_ONCE)
    code, report = job("collect", *AT_ONCE)
    assert (code, report["collected"], report["reason"], report["damaged"]) == (0, False, "Damaged", 1), report
    assert "expected sha256" in report["message"]


def test_it_runs_as_a_module_and_tells_its_progress(
    store: PopulationStore, committed: Committed, store_url: str
) -> None:
    train(store, committed, 2)
    place = ["--store", store_url, "--namespace", "team", "--population", "users", "--uid", "uid-1"]
    command = [sys.executable, "-m", "allele.store.jobs", "erase", *place]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ErasureReport.model_validate_json(done.stdout).reason == "Erased"
    assert "delete the rest: " in done.stderr
