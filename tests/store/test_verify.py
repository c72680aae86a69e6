"""Whatever is damaged behind the store's back is found and named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from allele.store import Fact, PopulationRecord, PopulationStore
from allele.store import verify as verification
from allele.store.verify import Damage, Verified, verify

from .test_damaged_bytes import provenance

Change = Callable[[str, Callable[[bytes], bytes]], None]


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.fixture
def whole(store: PopulationStore) -> PopulationStore:
    """Members a, b, c with two revisions each, both with state and provenance; revision 1 of a is retired."""
    store.claim(PopulationRecord(uid="u", base_digest="sha256:b", shapes={"g": "d"}))
    writer = store.catalogue.start("run")
    for step in (1, 2):
        sha = store.write_provenance(provenance().model_copy(update={"step": step}))
        weights = store.write_segments({m: f"{m}{step}".encode() * 50 for m in "abc"})
        states = store.write_segments({m: f"{m}{step} state".encode() * 50 for m in "abc"}, "states")
        facts = [
            Fact.committed(
                member=m, revision=step, weights=weights[m], state=states[m], group="g", shape="d", provenance=sha
            )
            for m in "abc"
        ]
        writer.commit(step, facts)
    writer.commit(3, [Fact(kind="Retired", member="a", revision=1)])
    return store


def fact(store: PopulationStore, member: str, revision: int) -> Fact:
    found = verification._committed(verification.Index.load(store.catalogue), member)
    return next(f for f in found if f.revision == revision)


def only(done: Verified) -> Damage:
    assert len(done.damaged) == 1, done.damaged
    return done.damaged[0]


def test_a_whole_population_is_whole(whole: PopulationStore) -> None:
    seen: list[tuple[int, int]] = []
    done = verify(whole, progress=lambda n, total: seen.append((n, total)))
    assert done == Verified(revisions=5, ranges=10, bytes=5 * (100 + 400), damaged=())
    assert seen[-1] == (2500, 2500)
    assert verify(whole, states=False).bytes == 500
    assert verify(whole, member="b").revisions == 2


@pytest.mark.parametrize("what", ["weights", "state"])
def test_a_flipped_bit_is_named_with_both_digests(whole: PopulationStore, damage: Change, what: str) -> None:
    place = getattr(fact(whole, "b", 2), what)
    damage(f"team/users/{place.path}", flip(place.offset + 7))
    found = only(verify(whole))
    assert (found.member, found.revision, found.what) == ("b", 2, what)
    assert found.object == f"{place.path} at {place.offset}"
    assert found.expected == place.digest != found.found and len(found.found) == 64
    assert verify(whole, member="c").damaged == ()


def test_a_truncated_object_names_what_is_cut_and_checks_the_rest(whole: PopulationStore, damage: Change) -> None:
    place = fact(whole, "b", 1).weights
    assert place is not None and place.offset == 100
    damage(f"team/users/{place.path}", lambda data: data[:150])
    done = verify(whole)
    assert [(d.member, d.revision, d.found) for d in done.damaged] == [
        ("b", 1, "50 of 100 bytes"),
        ("c", 1, "0 of 100 bytes"),
    ]


def test_what_lies_far_behind_a_cut_does_not_hide_what_is_before_it(whole: PopulationStore, damage: Change) -> None:
    written = whole.write_segments({"d": b"d" * 100, "gap": bytes(2 << 20), "e": b"e" * 100})
    facts = [Fact.committed(member=m, revision=1, weights=written[m], group="g", shape="d") for m in "de"]
    whole.catalogue.start("run").commit(9, facts)
    damage(f"team/users/{written['d'].path}", lambda data: b"!" + data[1:150])
    first, second = verify(whole).damaged
    assert (first.member, first.expected) == ("d", written["d"].digest)
    assert (second.member, second.found) == ("e", "0 of 100 bytes")


def test_a_missing_object_names_all_that_were_in_it(whole: PopulationStore) -> None:
    place = fact(whole, "c", 2).state
    assert place is not None
    whole.objects.delete([place.path])
    done = verify(whole)
    assert [(d.member, d.what, d.found) for d in done.damaged] == [(m, "state", "no such object") for m in "abc"]
    assert verify(whole, states=False).damaged == ()


def test_what_is_retired_is_not_looked_for(whole: PopulationStore, damage: Change) -> None:
    place = fact(whole, "b", 1).weights
    assert place is not None
    damage(f"team/users/{place.path}", flip(0))
    assert verify(whole).damaged == (), "a's revision 1 lies there"


def test_provenance_and_population_record_are_checked(whole: PopulationStore, damage: Change) -> None:
    sha = fact(whole, "b", 2).provenance
    damage(f"team/users/provenance/{sha}.json", lambda data: data.replace(b'"prompts":8', b'"prompts":9'))
    found = only(verify(whole))
    assert (found.revision, found.what, found.expected) == (2, "provenance", sha)
    damage("team/users/population.json", lambda data: data.replace(b'"g":"d"', b'"g":"e"'))
    shapes = [d for d in verify(whole).damaged if d.what == "shape"]
    assert len(shapes) == 5 and {(d.object, d.expected, d.found) for d in shapes} == {("population.json", "d", "e")}


def test_small_chunks_see_the_same(whole: PopulationStore, damage: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_CHUNK_BYTES", 150)
    place = fact(whole, "c", 2).weights
    assert place is not None
    damage(f"team/users/{place.path}", flip(place.offset))
    assert only(verify(whole)).member == "c"
