"""What refused probes mean for their members: told in few words, stopped when it goes on, forgotten when it ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allele.protocol.serving import Gate, Refusal
from allele_driver.exposure import Verdict, probes
from allele_driver.failures import FAILED_PROBES, Failures

GATE = Gate(max_gap=1e-4, min_move=1e-5)
REFUSALS: tuple[Refusal, ...] = ("LoadFailed", "Gap", "NotMoved")

verdicts = st.builds(
    Verdict,
    member=st.from_regex(r"[a-z0-9]{1,63}", fullmatch=True),
    revision=st.integers(1, 10**9),
    refusal=st.sampled_from(REFUSALS),
    max_gap=st.none() | st.floats(0, 100),
    mean_gap=st.none() | st.floats(0, 100),
    move=st.none() | st.floats(0, 100),
    message=st.text(max_size=2000),
)


def verdict(refusal: Refusal | None, *, outage: bool = False, revision: int = 2) -> Verdict:
    return Verdict("m", revision, refusal, 0.31, 0.12, 0.4, message="http://replica: too far", outage=outage)


@given(st.lists(verdicts, min_size=1, max_size=40, unique_by=lambda v: v.member))
def test_however_many_fail_the_words_are_few_and_the_counts_are_right(failing: list[Verdict]) -> None:
    found = probes(failing, gate=GATE)
    assert len(found.message) <= 1024
    assert found.failing == len(failing)
    assert found.reason == min((v.refusal for v in failing if v.refusal), key=REFUSALS.index)
    for kind in REFUSALS:
        n = sum(v.refusal == kind for v in failing)
        assert (f"{n} {kind}" in found.message) or not n
    assert sum(f"{v.member}@{v.revision}: {v.refusal}" in found.message for v in failing) >= min(3, len(failing))


def test_whatever_replicas_say_at_length_three_members_are_named() -> None:
    long = [Verdict("m" * 62 + str(i), 10**9, "Gap", 0.1, 0.1, 0.1, message="x" * 5000) for i in range(5)]
    found = probes(long, gate=GATE).message
    assert [f"{v.member}@" in found for v in long] == [True] * 3 + [False] * 2
    assert found.endswith("; and 2 more")


def test_the_numbers_stand_beside_the_gate() -> None:
    found = probes([verdict("Gap")], gate=GATE).message
    assert "m@2: Gap (max gap 0.31 of at most 0.0001, mean gap 0.12, move 0.4 of at least 1e-05)" in found
    assert "http://replica: too far" in found


def test_none_failing_is_well() -> None:
    assert (found := probes([], gate=GATE)).reason == "ProbesPassed" and found.failing == 0


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_member_stops_when_revision_after_revision_is_refused(refusal: Refusal) -> None:
    failures = Failures()
    for revision in range(2, FAILED_PROBES + 1):
        failures.probed(verdict(refusal, revision=revision), gate=GATE)
    assert not failures.stopped
    failures.probed(verdict(refusal, revision=9), gate=GATE)
    assert f"m@9: {refusal}" in failures.stopped["m"]


def test_one_that_passes_in_between_forgives() -> None:
    failures = Failures()
    for _ in range(3):
        for _ in range(FAILED_PROBES - 1):
            failures.probed(verdict("Gap"), gate=GATE)
        failures.probed(verdict(None), gate=GATE)
    assert not failures.stopped


def test_an_outage_is_not_the_members_fault_and_forgives_nothing() -> None:
    failures = Failures()
    for _ in range(10):
        failures.probed(verdict("LoadFailed", outage=True), gate=GATE)
    assert not failures.stopped
    for _ in range(FAILED_PROBES):
        failures.probed(verdict("Gap"), gate=GATE)
        failures.probed(verdict("LoadFailed", outage=True), gate=GATE)
    assert failures.stopped
