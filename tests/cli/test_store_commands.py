"""What the commands on a store say of a small population, for people and for programs, and what they change."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from allele.format import AdapterShape
from allele.protocol.commands import OptimizerSpec
from allele.protocol.errors import ProtocolError
from allele.store import (
    BaseRef,
    DataRange,
    Fact,
    Index,
    PopulationRecord,
    PopulationStore,
    Provenance,
    ShapeRef,
    StoreError,
    Versions,
)
from allele_cli.failure import Failure
from allele_cli.main import app

RUNNER = CliRunner(env={"COLUMNS": "250"})
CONFIG = {
    "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24,
}  # fmt: skip
SHAPE = AdapterShape.from_model(CONFIG, rank=2, targets=("q_proj", "down_proj"))


def row(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(SHAPE.numel).astype(np.float32)


def provenance(step: int) -> Provenance:
    spec = ShapeRef(digest=SHAPE.digest, rank=2, alpha=4, scaling="Standard", targets=SHAPE.targets, init="Standard")
    return Provenance(
        namespace="team",
        population="users",
        population_uid="uid-1",
        run="r",
        run_uid="run-1",
        fence=1,
        step=step,
        base=BaseRef(uri="file:///base", digest="sha256:b"),
        tokenizer_digest="t",
        shapes={"g": spec},
        environment="e",
        reward="r",
        data=DataRange(cursor=step, prompts=8),
        versions=Versions(allele="0"),
        optimizer=OptimizerSpec(),
        loss={"kind": "GRPO"},
        time=datetime(2026, 1, 1, tzinfo=UTC),
    )


@pytest.fixture
def store(tmp_path: Path) -> PopulationStore:
    """Members a and b with revisions 1 to 4 (states from 3 on), of which a's 1, 2 and 4 were exposed in turn."""
    store = PopulationStore.open(f"file://{tmp_path}/store", namespace="team", population="users")
    store.claim(PopulationRecord(uid="uid-1", base_digest="sha256:b", shapes={"g": SHAPE.digest}))
    writer = store.catalogue.start("run-1")
    for step in (1, 2, 3, 4):
        sha = store.write_provenance(provenance(step))
        weights = store.write_segments({m: SHAPE.pack(row(10 * step + i)) for i, m in enumerate("ab")})
        states = store.write_segments(dict.fromkeys("ab", b"state" * step), "states") if step > 2 else {}
        facts = [
            Fact.committed(
                member=m,
                revision=step,
                parent=step - 1 or None,
                weights=weights[m],
                state=states.get(m),
                group="g",
                shape=SHAPE.digest,
                provenance=sha,
                metrics={"reward": step / 10 if m == "a" else -step / 10, "policy_lag": 1.0},
            )
            for m in "ab"
        ]
        exposed = [Fact(kind="Exposed", member="a", revision=step)] if step != 3 else []
        writer.commit(step, [*facts, *exposed])
    return store


@pytest.fixture
def allele(store: PopulationStore, tmp_path: Path) -> Callable[..., Result]:
    def run(*words: str, code: int = 0) -> Result:
        where = [] if "--help" in words else ["--namespace", "team", "--store", f"file://{tmp_path}/store"]
        done = RUNNER.invoke(app, [*words, *where])
        assert done.exit_code == code, (done.output, done.exception)
        return done

    return run


@pytest.fixture
def refused(allele: Callable[..., Result]) -> Callable[..., None]:
    """What main() prints as one line after `allele: `."""

    def run(*words: str, match: str) -> None:
        done = allele(*words, code=1)
        assert isinstance(done.exception, Failure | ProtocolError | StoreError), done.exception
        assert "\n" not in str(done.exception)
        assert re.search(match, str(done.exception)), str(done.exception)

    return run


def as_json(allele: Callable[..., Result], *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(allele(*words, "-o", "json").stdout)
    return found


def index(store: PopulationStore) -> Index:
    return Index.load(store.catalogue)


def test_members_say_what_is_newest_served_held_and_pinned(
    store: PopulationStore, allele: Callable[..., Result]
) -> None:
    allele("rollback", "users/a", "--reason", "worse")
    allele("pin", "users/b@1")
    allele("pin", "users/b@3")
    found = as_json(allele, "members", "users")
    keys = ("member", "group", "newest", "exposed", "held", "pinned", "step", "reward")
    assert [tuple(r[k] for k in keys) for r in found] == [
        ("a", "g", 4, 2, 2, None, 4, 0.4),
        ("b", "g", 4, None, None, "1 3", 4, -0.4),
    ]
    text = allele("members", "users").stdout
    assert "PINNED" in text and "1 3" in text


@pytest.mark.parametrize(("words", "names"), [
    (("--sort", "reward"), ["a", "b"]),
    (("--sort", "reward", "--limit", "1"), ["a"]),
    (("--limit", "1"), ["a"]),
    (("--sort", "step"), ["a", "b"]),
])  # fmt: skip
def test_members_are_sorted_and_limited(
    allele: Callable[..., Result], words: tuple[str, ...], names: list[str]
) -> None:
    assert sorted(r["member"] for r in as_json(allele, "members", "users", *words)) == names


def test_revisions_say_what_became_of_each(store: PopulationStore, allele: Callable[..., Result]) -> None:
    writer = store.catalogue.start("x")
    events = [("Held", 2), ("Pinned", 2), ("Abandoned", 3), ("Retired", 1)]
    writer.commit(1, [Fact(kind=k, member="a", revision=r) for k, r in events])  # type: ignore[arg-type]
    found = as_json(allele, "revisions", "users/a")
    assert [(r["revision"], r["state"]) for r in found] == [
        (4, "exposed"),
        (3, "abandoned"),
        (2, "held pinned"),
        (1, "retired"),
    ]
    assert (found[0]["run"], found[0]["lag"], found[0]["bytes"], found[0]["state_bytes"]) == (
        "run-1", 1.0, SHAPE.packed_bytes, 20,
    )  # fmt: skip
    assert [r["revision"] for r in as_json(allele, "revisions", "users/a@3")] == [3]
    assert "abandoned" in allele("revisions", "users/a").stdout


def test_lineage_is_a_tree_and_json(allele: Callable[..., Result]) -> None:
    assert [r["revision"] for r in as_json(allele, "lineage", "users/a@3")] == [3, 2, 1]
    assert "base sha256:b" in allele("lineage", "users/a").stdout


def test_populations_and_stores_are_listed(store: PopulationStore, allele: Callable[..., Result]) -> None:
    (found,) = as_json(allele, "populations")
    size = sum(o.size for o in store.objects.list())
    keys = ("population", "uid", "groups", "members", "revisions", "bytes")
    assert tuple(found[k] for k in keys) == ("users", "uid-1", "g", 2, 8, size)
    (probed,) = as_json(allele, "stores")
    assert (probed["reachable"], probed["capabilities"]) == ("True", "CreateOnly IfMatch RangedRead List")
    assert "users" in allele("populations").stdout and "Reachable" in allele("stores").stdout


def test_diff_compares_what_is_added_to_the_base(allele: Callable[..., Result]) -> None:
    found = as_json(allele, "diff", "users/a@1", "users/a@2")
    first, second = (SHAPE.views(row(seed)) for seed in (10, 20))
    assert [(r["layer"], r["target"]) for r in found] == [
        ("all", "all"),
        ("0", "mlp.down_proj"), ("0", "self_attn.q_proj"), ("1", "mlp.down_proj"), ("1", "self_attn.q_proj"),
    ]  # fmt: skip
    deltas = []
    for r in found[1:]:
        name = f"base_model.model.model.layers.{r['layer']}.{r['target']}.lora_{{}}.weight"
        d = [2.0 * v[name.format("B")].astype(float) @ v[name.format("A")].astype(float) for v in (first, second)]
        cosine = np.sum(d[0] * d[1]) / np.linalg.norm(d[0]) / np.linalg.norm(d[1])
        expected = (*map(np.linalg.norm, d), np.linalg.norm(d[0] - d[1]), cosine)
        measured = (r["norm_first"], r["norm_second"], r["norm_difference"], r["cosine"])
        np.testing.assert_allclose(measured, expected, rtol=1e-9, atol=1e-12)
        deltas.append(d[0] - d[1])
    np.testing.assert_allclose(found[0]["norm_difference"], np.sqrt(sum(np.sum(d * d) for d in deltas)), rtol=1e-9)
    same = as_json(allele, "diff", "users/a", "users/a@4")[0]
    assert abs(same["norm_difference"]) < 1e-4 and same["cosine"] == pytest.approx(1)
    fields = as_json(allele, "diff", "users/a@1", "users/b@2", "--provenance")
    assert fields == [
        {"field": "data.cursor", "first": "1", "second": "2"},
        {"field": "step", "first": "1", "second": "2"},
    ]
    assert "COSINE" in allele("diff", "users/a@1", "users/a@2").stdout


def test_verify_is_silent_on_what_is_whole_and_exits_1_on_damage(
    store: PopulationStore, allele: Callable[..., Result]
) -> None:
    assert "8 revisions, 8 ranges" in allele("verify", "users").stdout
    assert "12 ranges" in allele("verify", "users", "--states").stdout
    assert "4 revisions" in allele("verify", "users", "--member", "a").stdout
    fact = index(store).get("b", 3)
    assert fact is not None and fact.segment is not None and fact.offset is not None
    path = Path(store.objects.url(fact.segment).removeprefix("file://"))
    data = bytearray(path.read_bytes())
    data[fact.offset + 100] ^= 1
    path.write_bytes(data)
    done = allele("verify", "users", "-o", "json", code=1)
    (found,) = json.loads(done.stdout)
    assert (found["member"], found["revision"], found["what"], found["expected"]) == ("b", 3, "weights", fact.digest)
    assert "1 damaged" in done.stderr
    assert fact.segment in allele("verify", "users", code=1).stdout


def test_rollback_holds_the_revision_exposed_before_and_again_the_one_before_that(
    store: PopulationStore, allele: Callable[..., Result], refused: Callable[..., None]
) -> None:
    assert "revision 2 is held, revision 4 was served before" in allele("rollback", "users/a", "--reason", "x").stdout
    hold, served = index(store).hold("a"), index(store).exposed("a")
    assert hold is not None and (hold.revision, hold.reason) == (2, "x")
    assert served is not None and served.revision == 2
    allele("rollback", "users/a", "--reason", "still wrong")
    assert (index(store).exposed("a") or hold).revision == 1
    refused("rollback", "users/a", "--reason", "x", match="no revision was exposed before 1; name one as a@N")
    allele("rollback", "users/a@3", "--reason", "this one")
    assert (index(store).exposed("a") or hold).revision == 3
    assert "lifted, revision 4 was served" in allele("rollback", "users/a", "--lift").stdout
    assert index(store).hold("a") is None and (index(store).exposed("a") or hold).revision == 4
    refused("rollback", "users/a", "--lift", match="expected a hold to lift, found none")
    refused("rollback", "users/a@2", match="--reason: expected why")
    refused("rollback", "users/b", "--reason", "x", match="no revision was exposed before None")
    refused("rollback", "users/a@9", "--reason", "x", match="no such committed revision; the newest is 4")
    refused("rollback", "users/c@1", "--reason", "x", match="expected a member of its catalogue, found 'c'")


def test_pins_are_set_and_lifted(
    store: PopulationStore, allele: Callable[..., Result], refused: Callable[..., None]
) -> None:
    allele("pin", "users/a")
    assert index(store).is_pinned("a", 4)
    allele("pin", "users/a@1", "--reason", "paper")
    allele("pin", "users/a", "--unpin")
    assert [index(store).is_pinned("a", r) for r in (1, 4)] == [True, False]
    allele("pin", "users/a")
    assert index(store).is_pinned("a", 4)
    refused("pin", "users/a@2", "--unpin", match=r"expected revision 2 to be pinned; pinned are \[1, 4\]")
    refused("pin", "users/b", match="nothing is exposed; name a revision as b@N")


def test_what_is_retired_is_neither_held_nor_pinned(store: PopulationStore, refused: Callable[..., None]) -> None:
    store.catalogue.start("x").commit(1, [Fact(kind="Retired", member="a", revision=1)])
    refused("pin", "users/a@1", match="revision 1 is retired, its bytes may be gone")
    refused("rollback", "users/a@1", "--reason", "x", match="revision 1 is retired")
    refused("diff", "users/a@1", "users/a@2", match="expected a revision with bytes and provenance")


def test_gc_says_what_it_would_do_and_then_does_it(store: PopulationStore, allele: Callable[..., Result]) -> None:
    words = ("gc", "users", "--keep-last", "1", "--max-policy-lag", "0")
    first = index(store).get("a", 1)
    segment = first and first.segment
    assert as_json(allele, *words) == [], "all is young"
    planned = as_json(allele, *words, "--grace", "0", "--dry-run")
    assert [(r["action"], r["what"]) for r in planned] == [("retire", w) for w in ("a@1", "b@1", "b@2")]
    assert {r["reason"] for r in planned} == {"not among the newest 1"}
    total = f"retire: 3, {sum(r['bytes'] for r in planned)} bytes"
    assert allele(*words, "--grace", "0", "--dry-run").stdout.splitlines()[-1] == total
    assert not index(store).is_retired("b", 1)
    assert as_json(allele, *words, "--grace", "0") == planned
    assert index(store).is_retired("b", 1) and not index(store).is_retired("a", 2)
    later = as_json(allele, *words, "--grace", "0")
    assert [(r["action"], r["what"]) for r in later] == [("delete", segment)]
    assert as_json(allele, *words, "--grace", "0") == []
    assert allele("verify", "users", "--states").exit_code == 0
    assert "nothing found" in allele(*words, "--dry-run").stdout


def test_gc_lists_folders_without_an_owner(store: PopulationStore, allele: Callable[..., Result]) -> None:
    assert as_json(allele, "gc", "--orphans") == []
    lost = PopulationStore.open(store.objects.url().removesuffix("/team/users"), namespace="team", population="lost")
    lost.write_segments({"m": b"12345"})
    (found,) = as_json(allele, "gc", "--orphans")
    assert (found["folder"], found["objects"], found["bytes"], found["reason"]) == (
        lost.objects.url(), 1, 5, "no population.json",
    )  # fmt: skip
    assert datetime.fromisoformat(found["newest"]) > datetime.now(UTC) - timedelta(minutes=5)
    lost.claim(PopulationRecord(uid="uid-9", base_digest="sha256:b", shapes={}, erasing=True))
    (found,) = as_json(allele, "gc", "--orphans")
    assert found["reason"] == "it belongs to the uid uid-9, whose erasure was begun"


def test_gc_without_a_population_says_what_is_missing(refused: Callable[..., None]) -> None:
    refused("gc", match="expected the name of a population, or --orphans")


def test_sql_sees_facts_and_heads(
    store: PopulationStore, allele: Callable[..., Result], refused: Callable[..., None]
) -> None:
    store.catalogue.start("x").commit(1, [Fact(kind="Abandoned", member="a", revision=4)])
    kinds = as_json(allele, "sql", "users", "select kind, count(*) as n from facts group by kind order by kind")
    assert kinds == [{"kind": "Abandoned", "n": 1}, {"kind": "Committed", "n": 8}, {"kind": "Exposed", "n": 3}]
    heads = "select member, newest, exposed, held, reward from heads order by member"
    assert as_json(allele, "sql", "users", heads) == [
        {"member": "a", "newest": 3, "exposed": 4, "held": None, "reward": 0.3},
        {"member": "b", "newest": 4, "exposed": None, "held": None, "reward": -0.4},
    ]
    allele("rollback", "users/a@2", "--reason", "x")
    assert as_json(allele, "sql", "users", heads)[0]["exposed"] == 2
    allele("rollback", "users/a", "--lift")
    assert as_json(allele, "sql", "users", heads)[0]["exposed"] == 4
    assert "Committed" in allele("sql", "users", "select kind, member from facts").stdout
    refused("sql", "users", "select nothing", match="sql: Binder Error")


def test_sql_has_a_prompt(store: PopulationStore) -> None:
    where = ["--namespace", "team", "--store", store.objects.url().removesuffix("/team/users")]
    done = RUNNER.invoke(app, ["sql", "users", *where], input="select count(*) as n from heads\nselect oops\n")
    assert done.exit_code == 0
    assert re.search(r"\bN\b.*\b2\b.*sql: Binder Error", done.output, re.DOTALL)


@pytest.mark.parametrize(
    "words", [("members", "users"), ("revisions", "users/a"), ("populations",), ("sql", "users", "select * from facts")]
)
def test_rows_are_the_same_in_every_format(allele: Callable[..., Result], words: tuple[str, ...]) -> None:
    rows = as_json(allele, *words)
    assert yaml.safe_load(allele(*words, "-o", "yaml").stdout) == rows
    table = pq.read_table(io.BytesIO(allele(*words, "-o", "parquet").stdout_bytes))
    assert table.num_rows == len(rows) > 0 and table.column_names == list(rows[0])


COMMANDS = "stores populations members revisions diff verify rollback pin gc sql"


@pytest.mark.parametrize("command", COMMANDS.split())
def test_every_command_has_help_with_an_example(allele: Callable[..., Result], command: str) -> None:
    assert f"allele {command} " in allele(command, "--help").stdout
