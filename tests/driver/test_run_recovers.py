"""Processes of a run are killed in the middle of it, and the run finishes with nothing lost and nothing repeated."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.driver.driver_parts import EXAMPLE, DrivenRun, bundle, wait_until

STEPS = 8


def check_nothing_lost_or_repeated(run: DrivenRun, *, steps: int) -> None:
    """One commit per step, each revision once, and an optimizer step for each revision."""
    assert run.commits() == list(range(steps + 2))
    counts = Counter((f.kind, f.member, f.revision) for f in run.facts() if f.kind == "Committed")
    assert set(counts.values()) == {1}
    for facts in run.committed().values():
        assert [f.revision for f in facts] == list(range(1, len(facts) + 1))
        assert [f.metrics["optimizer_step"] for f in facts[1:]] == list(range(1, len(facts)))


@pytest.mark.parametrize("at", [2, 5])
def test_a_killed_trainer_is_reset_to_the_last_commit(run: Callable[..., DrivenRun], at: int) -> None:
    killed = run(f"trainer-killed-{at}", steps=STEPS)
    driver = killed.start()
    killed.wait_step(at)
    pid = killed.pool.trainer.pid
    killed.pool.trainer.kill()
    killed.pool.start_trainer()
    assert killed.pool.trainer.pid != pid
    assert driver.wait() == 0, driver.output()[-3000:]
    resets = [line for line in driver.lines() if line["message"] == "trainer reset"]
    assert len({line["incarnation"] for line in resets}) == 2
    assert resets[-1]["step"] < STEPS, "the trainer was killed too late to matter"
    check_nothing_lost_or_repeated(killed, steps=STEPS)


@pytest.mark.parametrize("at", [2, 5])
def test_a_killed_driver_resumes_from_the_last_commit(run: Callable[..., DrivenRun], at: int) -> None:
    killed = run(f"driver-killed-{at}", steps=STEPS)
    first = killed.start()
    killed.wait_step(at)
    first.kill()
    done = max(killed.commits())
    assert at <= done < STEPS
    second = killed.start()
    assert second.pid != first.pid
    assert second.wait() == 0, second.output()[-3000:]
    (reset,) = [line for line in second.lines() if line["message"] == "trainer reset"]
    assert (reset["step"], reset["resumed"], reset["new"]) == (done, 3, 0)
    assert killed.progress.reports[-1].epoch == 2
    check_nothing_lost_or_repeated(killed, steps=STEPS)


def test_revisions_after_the_last_saved_state_are_abandoned(run: Callable[..., DrivenRun]) -> None:
    sparse = run("sparse-states", steps=6, checkpoints={"everySteps": 4})
    first = sparse.start()
    sparse.wait_step(2)
    first.kill()
    before = sparse.committed()
    assert sparse.start().wait() == 0
    abandoned = {(f.member, f.revision) for f in sparse.facts() if f.kind == "Abandoned"}
    assert abandoned == {(m, f.revision) for m, facts in before.items() for f in facts if f.state is None}
    assert abandoned
    for member, facts in sparse.committed().items():
        assert [f.revision for f in facts] == list(range(1, len(facts) + 1)), "revision numbers are never used again"
        next_one = facts[len(before[member])]
        assert next_one.parent == 1
        assert next_one.metrics["optimizer_step"] == 1


def test_an_older_driver_is_refused(run: Callable[..., DrivenRun]) -> None:
    contested = run("contested", steps=STEPS)
    old = contested.start()
    contested.wait_step(2)
    old.send(signal.SIGSTOP)
    new = contested.start()
    contested.wait_step(3)
    old.send(signal.SIGCONT)
    assert old.wait() == 4, old.output()[-3000:]
    assert "newer driver" in old.output()
    assert new.wait() == 0, new.output()[-3000:]
    check_nothing_lost_or_repeated(contested, steps=STEPS)


def test_sigterm_ends_after_the_step_in_flight_and_the_run_can_go_on(run: Callable[..., DrivenRun]) -> None:
    suspended = run("suspended", steps=5, checkpoints={"everySteps": 5})
    driver = suspended.start()
    suspended.wait_step(1)
    driver.send(signal.SIGTERM)
    assert driver.wait() == 143
    done = max(suspended.commits())
    assert done < 5
    assert suspended.start().wait() == 0
    check_nothing_lost_or_repeated(suspended, steps=5)


def test_a_failing_probe_keeps_the_revision_before_and_is_reported(run: Callable[..., DrivenRun]) -> None:
    gated = run("gated", members=2, steps=2, populationSpec={"exposure": {"maxGap": 1e-9, "minMove": 1e-5}})
    driver = gated.start()
    assert driver.wait() == 0
    assert not [f for f in gated.facts() if f.kind == "Exposed"]
    last = gated.progress.reports[-1]
    assert last.exposed == 0
    assert last.exposure_max_gap is not None and last.exposure_max_gap > 1e-9
    assert last.probes is not None and (last.probes.reason, last.probes.failing) == ("Gap", 2)
    assert any("of at most 1e-09" in line["message"] and line.get("failed") == 2 for line in driver.lines())


BROKEN = """
import time
from preferences import Preferences


class Broken(Preferences):
    def score(self, member, prompt, completion):
        if member.index == 0:
            raise RuntimeError("a bug in the reward")
        if member.index == 1:
            return float("nan")
        if member.index == 2:
            time.sleep(60)
        return super().score(member, prompt, completion)
"""


def test_broken_rewards_stop_their_members_and_not_the_run(run: Callable[..., DrivenRun], tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "preferences.py").write_text((EXAMPLE / "environment.py").read_text())
    (code / "broken.py").write_text(BROKEN)
    group = bundle("broken", uid="any", members=4, steps=3).run_spec.groups[0].model_dump(by_alias=True)
    group["environment"] = {"path": "broken:Broken", "timeoutSeconds": 1}
    broken = run("broken", members=4, steps=3, code=code, evaluation={"prompts": 0}, groups=[group])
    driver = broken.start()
    assert driver.wait() == 0, driver.output()[-3000:]
    last = broken.progress.reports[-1]
    assert sorted(last.failed_members) == ["taste-0000", "taste-0001", "taste-0002"]
    assert "raised" in last.failed_members["taste-0000"]
    assert "not finite" in last.failed_members["taste-0001"]
    assert "hung" in last.failed_members["taste-0002"]
    assert last.dropped_samples == 2 * 3 * 32
    assert "a bug in the reward" in driver.output()
    committed = broken.committed()
    assert len(committed["taste-0003"]) > 1
    assert all(len(committed[f"taste-000{i}"]) == 1 for i in range(3))


def test_a_trainer_that_is_away_is_waited_for(run: Callable[..., DrivenRun]) -> None:
    waiting = run("waiting", members=2, steps=1)
    waiting.pool.trainer.kill()
    driver = waiting.start()
    wait_until(
        lambda: any("waiting for trainer" in r.message for r in waiting.progress.reports),
        seconds=100,
        what="a report that says what is waited for",
    )
    waiting.pool.start_trainer()
    assert driver.wait() == 0
