"""Only what was trained is served: a gateway that serves a member wrongly keeps that member back, and nobody else."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from allele.protocol.progress import Probes
from allele_driver.failures import FAILED_PROBES
from tests.driver.driver_parts import NAMESPACE, DrivenRun, Pool, bundle, wait_until

WRONG, OTHER = "taste-0000", "taste-0001"


@pytest.fixture
def break_gateway(pool: Pool) -> Iterator[Callable[..., None]]:
    """Sets which members are served wrongly; all are served rightly again at the end."""

    def set_faults(**faults: str) -> None:
        draft = pool.faults.with_suffix(".new")
        draft.write_text(json.dumps({m.replace("_", "-"): fault for m, fault in faults.items()}))
        draft.replace(pool.faults)

    yield set_faults
    set_faults()


def probes(run: DrivenRun) -> Probes | None:
    return run.progress.reports[-1].probes if run.progress.reports else None


@pytest.mark.parametrize("fault", ["parent's bytes", "inert", "wrong scale"])
def test_a_member_that_is_served_wrongly_is_not_exposed_and_stops(
    run: Callable[..., DrivenRun], break_gateway: Callable[..., None], fault: str
) -> None:
    steps = FAILED_PROBES + 3
    wrong = run(f"wrong-{fault[:5].strip()}", members=2, steps=steps, evaluation={"prompts": 0})
    break_gateway(taste_0000=fault)
    driver = wrong.start()
    assert driver.wait() == 0, driver.output()[-3000:]

    exposed, committed = wrong.exposed(), wrong.committed()
    trained = [f.revision for f in committed[OTHER][1:]]
    assert exposed == {OTHER: trained} and trained
    last = wrong.progress.reports[-1]
    assert last.probes is not None and last.probes.failing == 1
    assert f"{WRONG}@" in last.probes.message and "of at most 0.0001" in last.probes.message
    assert sorted(last.failed_members) == [WRONG]
    why = last.failed_members[WRONG]
    assert "revisions in a row failed" in why and f"{WRONG}@" in why
    # it is sampled and trained until the verdict on the last of them is in, one step later
    assert len(committed[WRONG]) - 1 <= FAILED_PROBES + 1 < steps


def test_a_step_that_changes_nothing_is_not_exposed(run: Callable[..., DrivenRun]) -> None:
    group = bundle("still", uid="any", members=2, steps=2).run_spec.groups[0].model_dump(by_alias=True)
    group["optimizer"]["learningRate"] = 1e-12
    still = run("still", members=2, steps=2, evaluation={"prompts": 0}, groups=[group])
    driver = still.start()
    assert driver.wait() == 0, driver.output()[-3000:]
    assert not still.exposed()
    assert (found := probes(still)) is not None and found.reason == "NotMoved"
    assert "of at least 1e-05" in found.message


def test_a_member_recovers_when_it_is_served_rightly_again(
    run: Callable[..., DrivenRun], break_gateway: Callable[..., None]
) -> None:
    mended = run("mended", members=2, steps=8, evaluation={"prompts": 0})
    break_gateway(taste_0000="wrong scale")
    driver = mended.start()
    wait_until(lambda: (p := probes(mended)) is not None and p.failing, seconds=200, what="a probe that fails")
    break_gateway()
    assert driver.wait() == 0, driver.output()[-3000:]
    last = mended.progress.reports[-1]
    assert last.probes is not None and (last.probes.reason, last.probes.failing) == ("ProbesPassed", 0)
    assert not last.failed_members
    exposed, newest = mended.exposed(), mended.committed()[WRONG][-1].revision
    assert exposed[WRONG][-1] == newest and len(exposed[WRONG]) < len(exposed[OTHER])


def served(run: DrivenRun, model: str) -> list[float]:
    """Log-probabilities by which the tenant port answers under this name."""
    body = {"model": model, "prompt": "kbdac=", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    request = urllib.request.Request(
        f"{run.pool.tenant_url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: list[float] = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
    return found


def same(a: list[float], b: list[float]) -> bool:
    """But for what the company in a batch does to the last bits."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


def rollback(run: DrivenRun, adapter: str, *more: str) -> str:
    command = [sys.executable, "-m", "allele_cli", "rollback", adapter, "-n", NAMESPACE, "--store", run.pool.store]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_rollback_is_served_in_seconds_and_the_driver_exposes_nothing_over_it(run: Callable[..., DrivenRun]) -> None:
    held = run("held", members=2, steps=10_000, evaluation={"prompts": 0})
    driver = held.start()
    held.wait_step(4)
    assert "revision 2 is held" in rollback(held, f"held/{WRONG}@2", "--reason", "answers in French")
    old, new = served(held, f"held/{WRONG}@2"), served(held, f"held/{WRONG}@4")
    assert not same(old, new)
    name = f"held/{WRONG}"
    wait_until(lambda: same(served(held, name), old), seconds=10, what="the held revision under the bare name")

    seen = held.progress.step
    held.wait_step(seen + 1)  # a commit under way when the hold came did not know of it yet
    before = held.exposed()
    held.wait_step(seen + 4)
    assert held.exposed()[WRONG] == before[WRONG] and len(held.exposed()[OTHER]) > len(before[OTHER])
    assert same(served(held, name), old)
    assert (held.committed()[WRONG][-1].step or 0) > seen, "a held member trains on"

    assert "is lifted" in rollback(held, name, "--lift")
    wait_until(lambda: held.exposed()[WRONG][-1] > before[WRONG][-1], seconds=100, what="an exposure after the hold")
    wait_until(lambda: not same(served(held, name), old), seconds=10, what="a newer revision under the bare name")
    driver.send(signal.SIGTERM)
    assert driver.wait() == 143


def metric(run: DrivenRun, name: str) -> float:
    """Of the gateway, with its labels in their order."""
    with urllib.request.urlopen(f"{run.pool.gateway_url}/metrics", timeout=10) as answer:
        found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_gateways_are_told_what_comes_and_get_it_from_the_trainer(run: Callable[..., DrivenRun]) -> None:
    names = [f'allele_gateway_reads_total{{place="{place}"}}' for place in ("peer", "store")]
    names.append('allele_gateway_requests_total{outcome="ok",route="prefetch"}')
    near = run("near", members=4, steps=4, pace={"cohort": 2}, evaluation={"prompts": 0})
    before = [metric(near, n) for n in names]
    driver = near.start()
    assert driver.wait() == 0, driver.output()[-3000:]
    peer, store, told = (metric(near, n) - b for n, b in zip(names, before, strict=True))
    trained = sum(len(facts) - 1 for facts in near.committed().values())  # the first ones other runs have had too
    assert peer > 0 and trained <= peer + store <= trained + 4, "each revision once, whoever asks for it first"
    assert told >= 3
    assert near.exposed(), "the bytes are those that were trained"
