"""A run on a real trainer and a real engine: members learn, each step is one commit, what is served was trained."""

from __future__ import annotations

import hashlib
import json
import math
import urllib.request
from collections.abc import Callable

from allele.format import AdapterShape
from allele.protocol.commands import TrainerInfo
from allele.store import bases
from allele.store.verify import verify
from tests.driver.driver_parts import BASE, EXAMPLE, DrivenRun, Pool

STEPS = 14


def trainer_info(pool: Pool) -> TrainerInfo:
    with urllib.request.urlopen(f"{pool.trainer_url}/v1/info", timeout=10) as reply:
        return TrainerInfo.model_validate_json(reply.read())


def test_members_learn_and_every_step_is_one_commit(run: Callable[..., DrivenRun], pool: Pool) -> None:
    learning = run("learns", members=4, steps=STEPS)
    driver = learning.start()
    assert driver.wait() == 0, driver.output()[-3000:]
    assert trainer_info(pool).used == 0, "a run that ended gives its slots back"

    assert learning.commits() == list(range(STEPS + 2))
    committed = learning.committed()
    assert sorted(committed) == [f"taste-{i:04d}" for i in range(4)]
    for facts in committed.values():
        assert [f.revision for f in facts] == list(range(1, len(facts) + 1))
        assert [f.parent for f in facts] == [None, *range(1, len(facts))]
        steps = [f.step or 0 for f in facts]
        assert steps[0] == 0
        assert steps == sorted(set(steps))
        assert all(math.isfinite(f.metrics["loss"]) and f.metrics["logprob_gap"] < 1e-3 for f in facts[1:])
        assert all(f.state is not None for f in facts)

    exposed = {(f.member, f.revision) for f in learning.facts() if f.kind == "Exposed"}
    trained = {(f.member, f.revision) for facts in committed.values() for f in facts[1:]}
    assert exposed == trained
    (summary,) = [line["heldout_reward"] for line in driver.lines() if line["message"] == "summary"]
    assert summary["after"] > summary["before"] + 0.1


def test_provenance_names_where_revisions_come_from(run: Callable[..., DrivenRun]) -> None:
    traced = run("traced", members=2, steps=2)
    assert traced.start().wait() == 0
    last = [facts[-1] for facts in traced.committed().values()]
    found = traced.population.read_provenance(last[0].provenance or "")
    assert found.run_uid == traced.bundle.run_uid
    assert found.step == last[0].step
    assert found.base.digest == traced.bundle.population_spec.base.digest
    assert found.environment == "environment:Preferences"
    assert found.code_digest.startswith("sha256:")
    assert found.versions.allele and found.versions.sglang
    info = trainer_info(traced.pool)
    assert found.trainer == info.setting
    assert found.trainer.layout == {"tp": 1, "pp": 1, "ep": 1, "dp": 1, "sequence_parallel": 0, "recompute": 0}
    assert (found.trainer.device, found.trainer.dtype) == ("cpu", "float32")
    assert (found.run_generation, found.population_generation) == (1, 1)
    assert found.sampling is not None
    settings = traced.bundle.run_spec.groups[0].sampling
    assert found.sampling.model_dump(exclude={"stop_token_ids"}) == settings.model_dump()
    ends = json.loads((BASE / "generation_config.json").read_bytes())["eos_token_id"]
    assert found.sampling.stop_token_ids == (tuple(ends) if isinstance(ends, list) else (ends,))
    assert 1 <= len(found.probes) <= 4
    assert sum(len(p.completion) for p in found.probes) == len(last[0].probe or ())
    assert set(found.policy_lag) == {0}


def test_every_digest_of_the_provenance_can_be_computed_from_its_source(run: Callable[..., DrivenRun]) -> None:
    traced = run("recomputed", members=2, steps=2)
    assert traced.start().wait() == 0
    store, (group,) = traced.population, traced.bundle.population_spec.groups
    facts = [f for found in traced.committed().values() for f in found]
    config = json.loads((BASE / "config.json").read_bytes())
    shape = AdapterShape.from_model(config, rank=group.adapter.rank, targets=group.adapter.targets)
    for sha in {f.provenance or "" for f in facts}:
        data = store.objects.get(f"provenance/{sha}.json")
        assert sha256(data) == sha
        found = store.read_provenance(sha)
        assert found.base.digest == bases.digest(BASE)
        assert found.tokenizer_digest == "sha256:" + sha256((BASE / "tokenizer.json").read_bytes())
        template = json.loads((BASE / "tokenizer_config.json").read_bytes())["chat_template"]
        assert found.chat_template_digest == "sha256:" + sha256(template.encode())
        assert found.code_digest == "sha256:" + sha256((EXAMPLE / "environment.py").read_bytes())
        assert found.environment_parameters == traced.bundle.run_spec.groups[0].environment.parameters
        assert {name: (s.digest, s.seed) for name, s in found.shapes.items()} == {
            group.name: (shape.digest, group.seed)
        }
    assert {f.shape for f in facts} == {shape.digest}
    for fact in facts:
        assert fact.weights is not None and fact.state is not None
        for place in (fact.weights, fact.state):
            data = store.objects.get(place.path)[place.offset :][: place.length]
            assert sha256(data) == place.digest
    done = verify(store)
    assert (done.revisions, done.damaged) == (len(facts), ())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_progress_is_pushed_with_the_token_and_ends_with_success(run: Callable[..., DrivenRun]) -> None:
    told = run("told", members=2, steps=3)
    driver = told.start()
    told.wait_step(1)
    told.token.write_text("another-token")
    assert driver.wait() == 0
    last = told.progress.reports[-1]
    assert (last.phase, last.step, last.steps, last.members) == ("Succeeded", 3, 3, 2)
    assert last.committed == sum(len(facts) for facts in told.committed().values())
    assert last.exposed == sum(f.kind == "Exposed" for f in told.facts())
    assert last.reward is not None and 0 <= last.reward.worst <= last.reward.mean <= last.reward.best <= 1
    assert {"generate", "score", "train", "export", "commit"} <= last.stages.keys()
    assert told.progress.tokens[0] == "Bearer a-token"
    assert told.progress.tokens[-1] == "Bearer another-token"


def test_a_second_run_goes_on_from_the_newest_revision_with_its_optimizer(run: Callable[..., DrivenRun]) -> None:
    first = run("goes-on", members=2, steps=2)
    assert first.start().wait() == 0
    before = {m: facts[-1] for m, facts in first.committed().items()}
    second = run("goes-on", members=2, steps=2)
    assert second.start().wait() == 0
    for member, facts in second.committed().items():
        new = [f for f in facts if f.run == second.bundle.run_uid]
        assert new, "the second run trained nothing"
        assert new[0].parent == before[member].revision
        assert new[0].metrics["optimizer_step"] == before[member].metrics["optimizer_step"] + 1


def test_sampling_overlaps_training_when_lag_is_allowed(run: Callable[..., DrivenRun]) -> None:
    lagging = run("lagging", members=2, steps=4, pace={"maxPolicyLag": 1})
    assert lagging.start().wait() == 0
    lags = {
        (f.step or 0): lagging.population.read_provenance(f.provenance or "").policy_lag
        for facts in lagging.committed().values()
        for f in facts[1:]
    }
    assert set(lags[1]) == {0}
    assert {lag for step, found in lags.items() if step > 1 for lag in found} <= {0, 1}
    assert any(1 in found for found in lags.values())


def test_a_cohort_takes_turns_and_no_member_is_left_without_state(run: Callable[..., DrivenRun]) -> None:
    turns = run("turns", members=6, steps=3, pace={"cohort": 2}, checkpoints={"everySteps": 3})
    assert turns.start().wait() == 0
    trained: dict[int, set[str]] = {}
    for facts in turns.committed().values():
        assert facts[-1].state is not None
        for f in facts[1:]:
            trained.setdefault(f.step or 0, set()).add(f.member)
    for step, members in trained.items():
        assert members <= {f"taste-{2 * (step - 1) + k:04d}" for k in range(2)}
