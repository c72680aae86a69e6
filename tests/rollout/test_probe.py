"""A revision passes its probe only when what is served is what was trained, and differs from its parent."""

from __future__ import annotations

from collections.abc import Callable

from allele.store.facts import Fact
from tests.rollout.rollout_parts import (
    PROBES,
    ProbeSequence,
    Service,
    StoredPopulation,
    call,
    inert_adapter,
    random_adapter,
    reference,
)

Start = Callable[..., Service]


def test_the_trained_bytes_pass(gateway: Start, population: StoredPopulation) -> None:
    adapters = {f"m{i}": random_adapter(i) for i in range(6)}
    probes = {m: reference(packed, PROBES) for m, packed in adapters.items()}
    version = population.commit(adapters, probes=probes)
    reply = gateway().probe(version, [(m, 1) for m in adapters])
    assert [(r.member, r.verdict) for r in reply.results] == [(m, "Passed") for m in adapters]
    for r in reply.results:
        assert r.max_gap is not None and r.mean_gap is not None and r.move is not None
        assert 0 < r.mean_gap <= r.max_gap < 1e-5 and r.move > 0.1


def test_other_bytes_of_the_same_shape_fail_by_their_gap(gateway: Start, population: StoredPopulation) -> None:
    probes = {"a": reference(random_adapter(1), PROBES), "b": reference(random_adapter(2), PROBES)}
    version = population.commit({"a": random_adapter(2), "b": random_adapter(2)}, probes=probes)
    a, b = gateway().probe(version, [("a", 1), ("b", 1)]).results
    assert a.verdict == "Gap" and a.max_gap is not None and a.max_gap > 0.01 and "expected at most" in a.message
    assert b.verdict == "Passed"


def test_an_adapter_that_does_nothing_fails(gateway: Start, population: StoredPopulation) -> None:
    version = population.commit({"a": inert_adapter()}, probes={"a": reference(None, PROBES)})
    (result,) = gateway().probe(version, [("a", 1)]).results
    assert result.verdict == "NotMoved" and result.move is not None and result.move < 1e-5


def test_the_parents_bytes_fail(gateway: Start, population: StoredPopulation) -> None:
    first, second = random_adapter(1), random_adapter(2)
    probes = {m: reference(first, PROBES) for m in ("same", "moved")}
    population.commit({"same": first, "moved": first}, probes=probes)
    version = population.commit(
        {"same": first, "moved": second},
        revision=2,
        parent=1,
        probes={"same": probes["same"], "moved": reference(second, PROBES)},
    )
    same, moved = gateway().probe(version, [("same", 2), ("moved", 2)]).results
    assert same.verdict == "NotMoved"
    assert moved.verdict == "Passed"


def test_a_parent_with_other_probes_is_served_for_comparison(gateway: Start, population: StoredPopulation) -> None:
    first, other = random_adapter(1), (ProbeSequence(prompt=(3, 2), completion=(4, 5)),)
    population.commit({"a": first}, probes={"a": reference(first, other)}, sequences=other)
    version = population.commit({"a": first}, revision=2, parent=1, probes={"a": reference(first, PROBES)})
    (result,) = gateway().probe(version, [("a", 2)]).results
    assert result.verdict == "NotMoved" and result.move == 0


def test_what_cannot_be_loaded_or_has_no_probe_does_not_pass(gateway: Start, population: StoredPopulation) -> None:
    version = population.commit({"a": random_adapter(1)})
    missing, unprobed = gateway().probe(version, [("a", 9), ("a", 1)]).results
    assert missing.verdict == "LoadFailed" and "no revision 9" in missing.message
    assert unprobed.verdict == "Gap" and "expected 0 logprobs (at least one)" in unprobed.message


def test_a_replica_that_was_not_asked_proves_what_is_exposed_before_it_serves_it(
    gateway: Start, population: StoredPopulation
) -> None:
    first, second = random_adapter(1), random_adapter(2)
    sound = {m: reference(first, PROBES) for m in ("sound", "other-bytes", "never-right")}
    sound["never-right"] = reference(second, PROBES)
    population.commit(dict.fromkeys(sound, first), probes=sound, expose=True)
    population.commit(
        {"sound": second, "other-bytes": random_adapter(3)},
        revision=2,
        parent=1,
        probes=dict.fromkeys(("sound", "other-bytes"), reference(second, PROBES)),
        expose=True,
    )
    population.commit(
        {"idle": inert_adapter(), "held": inert_adapter()},
        probes=dict.fromkeys(("idle", "held"), reference(None, PROBES)),
        expose=True,
    )
    population.add([Fact(kind="Held", member="held", revision=1, reason="rollback")])
    service = gateway()
    assert service.complete("styles/idle").status == 409
    assert service.complete("styles/held").status == 200, "a person may go back to what does nothing"
    for _ in range(2):
        answers = {m: service.complete(f"styles/{m}") for m in sound}
        assert answers["sound"].headers["x-allele-revision"] == "2"
        assert answers["other-bytes"].headers["x-allele-revision"] == "1", "the revision before is served instead"
        refused = answers["never-right"]
        assert refused.status == 409 and "probe on this replica: Gap" in refused.json["error"]["message"]
    assert service.complete("styles/never-right@1").status == 200, "who names a revision gets it"
    metrics = call(f"{service.internal}/metrics").body.decode()
    assert 'allele_gateway_probes_total{verdict="Gap"} 2.0' in metrics, "each is probed once"
