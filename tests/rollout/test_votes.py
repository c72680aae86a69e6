"""The majority wins whatever the order of the answers; ties go to the surest, then to the first named."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from allele_rollout.gateway.votes import Answer, Side, majority, normalised

TEXTS = st.sampled_from(["42", " 42\n", "４２", "Yes", "YES", "yes ", "no", "", "straße", "STRASSE"])
LOGPROBS = st.floats(max_value=0.0, allow_nan=False)


@st.composite
def ballots(draw: st.DrawFn) -> list[Answer]:
    texts = draw(st.lists(TEXTS, min_size=1, max_size=12))
    return [Answer(f"p/m{i}", text, draw(LOGPROBS)) for i, text in enumerate(texts)]


def shapes(sides: list[Side]) -> set[tuple[str, frozenset[str]]]:
    return {(normalised(s.text), frozenset(s.members)) for s in sides}


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_case_width_and_white_space_do_not_part_answers() -> None:
    assert normalised(" Straße\n\tNo. ４２ ") == "strasse no. 42"
    assert normalised("42") != normalised("43")


@given(ballots())
def test_each_member_is_on_one_side_together_with_those_who_said_the_same(answers: list[Answer]) -> None:
    sides = majority(answers)
    assert sorted(m for s in sides for m in s.members) == sorted(a.member for a in answers)
    said = {a.member: normalised(a.text) for a in answers}
    for side in sides:
        assert {said[m] for m in side.members} == {normalised(side.text)}
        assert side.surest.member in side.members and side.surest.text == side.text
    assert len({normalised(s.text) for s in sides}) == len(sides)


@given(ballots())
def test_no_side_has_more_votes_than_the_winner_nor_as_many_and_more_certainty(answers: list[Answer]) -> None:
    first, *others = majority(answers)
    for other in others:
        assert (len(other.members), other.surest.logprob) <= (len(first.members), first.surest.logprob)
    assert first.surest.logprob == max(a.logprob for a in answers if a.member in first.members)


@given(ballots(), st.randoms(use_true_random=False))
def test_the_order_of_the_answers_matters_only_between_equals(answers: list[Answer], random: object) -> None:
    shuffled = list(answers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert shapes(majority(shuffled)) == shapes(majority(answers))
    ranks = [(len(s.members), s.surest.logprob) for s in majority(answers)]
    if ranks.count(ranks[0]) == 1:
        assert normalised(majority(shuffled)[0].text) == normalised(majority(answers)[0].text)


@given(ballots())
def test_one_vote_more_for_the_winner_leaves_it_the_winner(answers: list[Answer]) -> None:
    first = majority(answers)[0]
    again = majority([*answers, Answer("p/late", first.text, -math.inf)])[0]
    assert set(again.members) == {*first.members, "p/late"} and again.surest == first.surest


def test_between_equal_sides_the_surest_wins_and_then_the_first_named() -> None:
    sure, first = Answer("p/c", "no", -0.1), Answer("p/a", "yes", -0.5)
    assert majority([first, sure])[0].surest == sure
    assert [s.text for s in majority([first, Answer("p/b", "no", -0.5)])] == ["yes", "no"]
    same = majority([Answer("p/a", "Yes", -0.5), Answer("p/b", "yes", -0.5)])[0]
    assert same.surest.member == "p/a" and same.text == "Yes"
