"""A population's folder is never mixed with another's."""

from __future__ import annotations

import json

import pytest

from allele.store import OwnershipError, PopulationRecord, PopulationStore
from allele.store.population import RECORD

pytestmark = pytest.mark.everywhere

MINE = PopulationRecord(uid="uid-1", base_digest="sha256:base", shapes={"g": "shape"})


def test_claiming_is_repeatable_and_recorded(store: PopulationStore) -> None:
    assert store.record() is None
    store.claim(MINE)
    store.claim(MINE)
    assert store.record() == MINE


def test_what_a_later_version_wrote_into_the_record_stays(store: PopulationStore) -> None:
    later = {**MINE.model_dump(), "quota": {"bytes": 1}}
    store.objects.put(RECORD, json.dumps(later).encode())
    store.claim(MINE.model_copy(update={"shapes": {"h": "another"}}))
    found = json.loads(store.objects.get(RECORD))
    assert found["quota"] == {"bytes": 1}
    assert found["shapes"] == {"g": "shape", "h": "another"}


def test_another_population_is_refused_unless_it_adopts(store: PopulationStore) -> None:
    store.claim(MINE)
    other = MINE.model_copy(update={"uid": "uid-2"})
    with pytest.raises(OwnershipError, match=r"population\.json: uid: expected uid-2, found uid-1; set spec\.adopt"):
        store.claim(other)
    assert store.record() == MINE
    store.claim(other.model_copy(update={"adopt": True}))
    assert store.record() == other
    with pytest.raises(OwnershipError, match="found uid-2"):
        store.claim(MINE)


@pytest.mark.parametrize("adopt", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_digest": "sha256:else"}, "base digest: expected sha256:else, found sha256:base"),
        ({"shapes": {"g": "else"}}, "shape of group g: expected else, found shape"),
    ],
)
def test_another_base_or_shape_is_refused(
    store: PopulationStore, change: dict[str, object], message: str, adopt: bool
) -> None:
    store.claim(MINE)
    with pytest.raises(OwnershipError, match=message):
        store.claim(MINE.model_copy(update={**change, "adopt": adopt}))


@pytest.mark.parametrize("adopt", [False, True])
def test_a_group_that_froze_something_else_is_refused_though_its_shape_is_the_same(
    store: PopulationStore, adopt: bool
) -> None:
    store.claim(MINE)
    other = MINE.model_copy(update={"inits": {"g": "PiSSA Rank2r"}, "adopt": adopt})
    with pytest.raises(OwnershipError, match="init of group g: expected PiSSA Rank2r, found Standard Untouched"):
        store.claim(other)
    store.claim(MINE.model_copy(update={"shapes": {"h": "shape"}, "inits": {"h": "PiSSA Rank2r"}}))
    record = store.record()
    assert record is not None and record.inits == {"h": "PiSSA Rank2r"}
    with pytest.raises(OwnershipError, match="init of group h: expected Standard Untouched, found PiSSA Rank2r"):
        store.claim(MINE.model_copy(update={"shapes": {"h": "shape"}}))


def test_groups_may_be_added(store: PopulationStore) -> None:
    store.claim(MINE)
    store.claim(MINE.model_copy(update={"shapes": {"h": "other"}}))
    record = store.record()
    assert record is not None
    assert record.shapes == {"g": "shape", "h": "other"}


def test_populations_do_not_see_each_other(store_url: str, store: PopulationStore) -> None:
    other = PopulationStore.open(store_url, namespace="team", population="users-2")
    store.claim(MINE)
    store.catalogue.start("run")
    assert other.record() is None
    assert other.catalogue.version() == -1
