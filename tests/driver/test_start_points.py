"""Where a member starts, read from a real catalogue: after a crash, in a new run, with states saved now and then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from allele.api.run import StartFrom
from allele.protocol.commands import ByteRange, OptimizerSpec
from allele.store import Catalogue, Fact, Index, Objects, Writer
from allele_driver.loop.record import lag_of
from allele_driver.loop.resume import StartPoint, start_point, unexposed
from allele_driver.members import Member, members_of
from tests.driver.driver_parts import bundle

MEMBER: Member = members_of(bundle("p", uid="u", members=1, steps=1).population_spec.groups[0], Path())[0]


class Story:
    """A catalogue written revision by revision."""

    def __init__(self, tmp_path: Path) -> None:
        self.catalogue = Catalogue.open(Objects.open(f"file://{tmp_path}/population"))
        self._writers: dict[str, Writer] = {}

    def commit(self, run: str, *facts: Fact) -> None:
        if run not in self._writers:
            self._writers[run] = self.catalogue.start(run)
        writer = self._writers[run]
        writer.commit(0 if writer.last_step is None else writer.last_step + 1, facts)

    def revisions(self, run: str, numbers: Sequence[int], *, state: bool = True, first: int | None = None) -> None:
        """One commit a revision, each the child of the one before; `first` is the parent of the first."""
        for number in numbers:
            parent = first if number == numbers[0] else number - 1
            self.commit(run, committed(number, parent=parent, state=state))

    def start(self, run: str, revision: Any = "Newest", optimizer: Any = "Resume") -> StartPoint:
        index = Index.load(self.catalogue)
        return start_point(MEMBER, index, run=run, start_from=StartFrom(revision=revision, optimizer=optimizer))


def where(kind: str, number: int) -> ByteRange:
    return ByteRange(path=f"{kind}/x.seg", offset=10 * number, length=10, digest=f"{number}")


def committed(number: int, *, parent: int | None, state: bool = True) -> Fact:
    return Fact.committed(
        member=MEMBER.name,
        revision=number,
        weights=where("segments", number),
        state=where("states", number) if state else None,
        parent=parent,
        shape="s",
        probe=(-1.0,),
    )


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def test_a_new_member_begins_at_its_initialisation(story: Story) -> None:
    found = story.start("a")
    assert found == StartPoint(MEMBER)
    command = found.command(OptimizerSpec())
    assert (command.state, command.weights, command.seed) == (None, None, MEMBER.seed)


def test_a_run_resumes_from_its_own_last_state(story: Story) -> None:
    story.revisions("a", [1, 2, 3])
    found = story.start("a")
    assert (found.revision, found.state, found.abandoned) == (3, where("states", 3), ())


def test_revisions_after_the_last_state_are_abandoned_once(story: Story) -> None:
    story.revisions("a", [1, 2])
    story.revisions("a", [3, 4], state=False, first=2)
    found = story.start("a")
    assert (found.revision, found.state, found.abandoned) == (2, where("states", 2), (3, 4))
    story.commit("a", *(Fact(kind="Abandoned", member=MEMBER.name, revision=r) for r in found.abandoned))
    assert story.start("a").abandoned == ()
    story.commit("a", committed(5, parent=2))
    assert story.start("a").revision == 5


def test_another_run_starts_where_the_first_ended_or_was_exposed(story: Story) -> None:
    story.revisions("a", [1, 2, 3])
    story.commit("a", Fact(kind="Exposed", member=MEMBER.name, revision=2))
    assert story.start("b").state == where("states", 3)
    assert story.start("b", revision="Exposed").state == where("states", 2)
    fresh = story.start("b", optimizer="Fresh")
    assert (fresh.revision, fresh.state, fresh.weights) == (3, None, where("segments", 3))
    assert story.start("b", revision="Base") == StartPoint(MEMBER)


def test_a_run_that_saved_no_state_yet_starts_as_it_did_at_first(story: Story) -> None:
    story.revisions("a", [1, 2])
    story.commit("a", Fact(kind="Exposed", member=MEMBER.name, revision=2))
    story.revisions("b", [3, 4], state=False, first=2)
    story.commit("b", Fact(kind="Exposed", member=MEMBER.name, revision=4))
    for revision in ("Newest", "Exposed"):
        found = story.start("b", revision=revision)
        assert (found.revision, found.state, found.abandoned) == (2, where("states", 2), (3, 4))


def test_without_a_state_another_run_takes_the_weights(story: Story) -> None:
    story.revisions("a", [1], state=False)
    found = story.start("b")
    assert (found.revision, found.state, found.weights) == (1, None, where("segments", 1))


def test_what_waits_for_exposure(story: Story) -> None:
    story.revisions("a", [1, 2, 3])

    def waits(revision: int) -> bool:
        return unexposed(MEMBER.name, revision, Index.load(story.catalogue))

    assert not waits(1), "a first revision is the base: there is nothing to tell apart"
    assert waits(3)
    story.commit("a", Fact(kind="Exposed", member=MEMBER.name, revision=3))
    assert not waits(3)
    assert waits(2)
    story.commit("ops", Fact(kind="Held", member=MEMBER.name, revision=3, reason="rollback"))
    assert not waits(2), "a hold is respected"


def test_lag_counts_revisions_along_the_branch(story: Story) -> None:
    story.revisions("a", [1, 2])
    story.commit("a", committed(5, parent=2))
    index = Index.load(story.catalogue)
    assert [lag_of(r, 5, MEMBER.name, index) for r in (5, 2, 1)] == [0, 1, 2]
