"""What the operator believes about the cluster, when answers, events and listings come late or out of order."""

from __future__ import annotations

from typing import Any

from allele_operator.cache import Cache
from allele_operator.planning.model import Options, Ref

POOL = Ref("BasePool", "team", "pool")


def cache() -> Cache:
    return Cache(Options(operator_url="http://operator", image="image"), progress=lambda _: None, gateways=lambda _: ())


def raw(name: str = "pool", *, version: int, uid: str = "uid-1", kind: str = "BasePool", **more: Any) -> dict[str, Any]:
    head = {"name": name, "namespace": "team", "uid": uid, "resourceVersion": str(version), "generation": 1}
    return {"kind": kind, "metadata": head | more.pop("metadata", {}), "spec": more.pop("spec", {}), **more}


def owned_by(uid: str) -> dict[str, Any]:
    return {"ownerReferences": [{"apiVersion": "v1", "kind": "BasePool", "name": "x", "uid": uid}]}


def test_an_older_version_never_replaces_a_newer_one() -> None:
    c = cache()
    assert c.put("BasePool", raw(version=10, spec={"suspend": True})) is not None
    assert c.put("BasePool", raw(version=9, spec={"suspend": False})) is None
    found = c.get(POOL)
    assert found is not None and found["spec"] == {"suspend": True}


def test_a_new_version_that_says_the_same_is_no_news_but_is_remembered() -> None:
    c = cache()
    c.put("BasePool", raw(version=10))
    assert c.put("BasePool", raw(version=11)) is None
    found = c.get(POOL)
    assert found is not None and found["metadata"]["resourceVersion"] == "11"


def test_a_late_deletion_of_a_predecessor_does_not_remove_its_successor() -> None:
    c = cache()
    c.put("BasePool", raw(version=10, uid="old"))
    c.put("BasePool", raw(version=20, uid="new"))
    assert c.remove(POOL, uid="old") is None
    assert c.get(POOL) is not None


def test_a_late_answer_does_not_bring_back_what_was_deleted() -> None:
    c = cache()
    c.put("BasePool", raw(version=10))
    assert c.remove(POOL, uid="uid-1") is not None
    assert c.put("BasePool", raw(version=11)) is None
    assert c.get(POOL) is None


def test_owned_objects_are_found_by_owner_and_kind_and_lost_with_the_reference() -> None:
    c = cache()
    c.put("Job", raw("a", version=1, uid="a", kind="Job", metadata=owned_by("uid-1")))
    c.put("Pod", raw("b", version=2, uid="b", kind="Pod", metadata=owned_by("uid-1"), status={}))
    assert [o["metadata"]["name"] for o in c.owned("uid-1", "Job")] == ["a"]
    c.put("Job", raw("a", version=3, uid="a", kind="Job"))
    assert c.owned("uid-1", "Job") == []
    assert c.select("Pod", "team") and not c.select("Pod", "other")


def test_a_listing_removes_what_it_no_longer_has_and_keeps_what_is_younger() -> None:
    c = cache()
    for name, version in (("gone", 5), ("there", 6), ("young", 50)):
        c.put("BasePool", raw(name, version=version, uid=name))
    lost = list(c.settle("BasePool", listed={"there"}, version="20", namespace=None))
    assert [o["metadata"]["name"] for o in lost] == ["gone"]
    assert {r.name for r in c.refs("BasePool")} == {"there", "young"}
    assert c.count() == {"BasePool": 2}


def test_a_listing_of_one_namespace_leaves_the_others_alone() -> None:
    c = cache()
    c.put("BasePool", raw(version=5))
    assert list(c.settle("BasePool", listed=set(), version="20", namespace="other")) == []
