"""`allele export` and `allele import`: out of a population and into it, bit for bit, or one line that says why not."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allele.format import AdapterShape, export_peft
from allele.protocol.commands import OptimizerSpec
from allele.store import (
    BaseRef,
    DataRange,
    Fact,
    Index,
    Objects,
    PopulationRecord,
    PopulationStore,
    Provenance,
    ShapeRef,
    Versions,
    bases,
)
from allele_cli.main import main
from tests.format.folders import save

BASE = Path(__file__).parents[2] / "examples/preferences/base"
TARGETS = ("q_proj", "v_proj")
SCALE = 2.0


@pytest.fixture
def shape() -> AdapterShape:
    return AdapterShape.from_model(json.loads((BASE / "config.json").read_text()), rank=4, targets=TARGETS)


@pytest.fixture
def store(tmp_path: Path, shape: AdapterShape) -> PopulationStore:
    """Population `users`, claimed; its group `a` has rank 4 and scale 2; no member yet."""
    url = f"file://{tmp_path}/store"
    base = bases.put(Objects.open(url), "tiny", BASE)
    store = PopulationStore.open(url, namespace="team", population="users")
    store.claim(PopulationRecord(uid="uid-1", base_digest=base.digest, shapes={"a": shape.digest}))
    return store


def values(shape: AdapterShape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape.numel).astype("<f4")


def trained(store: PopulationStore, shape: AdapterShape, member: str, **spec: object) -> Fact:
    """A first revision of a member, as a run commits it."""
    writer = store.catalogue.start("run-1")
    record = store.record()
    assert record is not None
    made = Provenance(
        namespace="team",
        population="users",
        population_uid="uid-1",
        run="first",
        run_uid="run-1",
        fence=writer.fence,
        step=0,
        base=BaseRef(uri=str(store.objects.url()).replace("team/users", "bases/tiny"), digest=record.base_digest),
        tokenizer_digest="t",
        shapes={
            "a": ShapeRef(
                **{"digest": shape.digest, "rank": 4, "alpha": 8, "scaling": "Standard", "targets": TARGETS}
                | {"init": "Standard"}
                | spec
            )
        },
        environment="here",
        reward="here.score",
        data=DataRange(cursor=0, prompts=0),
        versions=Versions(allele="1"),
        optimizer=OptimizerSpec(),
        loss={},
        time=datetime.now(UTC),
    )
    weights = store.write_segments({member: shape.pack(values(shape, 0))})[member]
    fact = Fact.committed(
        member=member,
        revision=1,
        weights=weights,
        group="a",
        provenance=store.write_provenance(made),
        shape=shape.digest,
    )
    writer.commit(0, [fact])
    return fact


Allele = Callable[..., tuple[int, str, str]]


@pytest.fixture
def allele(store: PopulationStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Allele:
    """Exit code, stdout and stderr of a command on the population's store."""
    url = store.objects.url().removesuffix("/team/users")

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["allele", *map(str, words), "--store", url, "--namespace", "team"])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_folder_becomes_a_members_next_revision_and_is_exported_again(
    store: PopulationStore, shape: AdapterShape, allele: Allele, tmp_path: Path
) -> None:
    trained(store, shape, "ann")
    row = values(shape, 1)
    tensors = {name.removeprefix("base_model.model."): a for name, a in reversed(shape.views(row).items())}
    folder = save(tmp_path / "theirs/checkpoint-3", tensors)

    assert allele("import", "users/ann", tmp_path / "theirs")[:2] == (
        0,
        f"users/ann@2 sha256:{hashlib.sha256(shape.pack(row)).hexdigest()}\n",
    )

    index = Index.load(store.catalogue)
    fact = index.newest("ann")
    assert fact is not None and fact.weights is not None and fact.provenance is not None
    assert (fact.revision, fact.parent, fact.group, fact.shape) == (2, None, "a", shape.digest)
    assert fact.reason == f"imported from {tmp_path / 'theirs'}"
    assert store.read(fact.weights) == shape.pack(row)
    made = store.read_provenance(fact.provenance)
    assert made.imported is not None
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert made.imported.sha256 == hashlib.sha256(weights).hexdigest()
    assert (made.run, made.fence, made.shapes["a"].scale) == ("import", 1, SCALE)
    assert index.exposed("ann") is None
    assert index.resume_point(["ann"]) == {}

    assert allele("export", "users/ann@2", "--to", tmp_path / "out")[0] == 0
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == shape.pack(row)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == SCALE


def test_a_member_that_is_not_there_yet_begins_at_revision_1(
    store: PopulationStore, shape: AdapterShape, allele: Allele, tmp_path: Path
) -> None:
    trained(store, shape, "ann")
    for revision in (1, 2, 3):
        row = values(shape, revision)
        folder = export_peft(shape.pack(row), tmp_path / "f", shape=shape, scale=SCALE, base_name="tiny")
        assert allele("import", "users/bob", folder, "--group", "a")[1].startswith(f"users/bob@{revision} ")
    index = Index.load(store.catalogue)
    assert index.next_revision("bob") == 4
    assert index.next_revision("ann") == 2


def test_another_scale_is_folded_only_when_asked(
    store: PopulationStore, shape: AdapterShape, allele: Allele, tmp_path: Path
) -> None:
    trained(store, shape, "ann")
    row = values(shape, 1)
    folder = save(tmp_path / "f", shape.views(row), lora_alpha=4)
    code, out, err = allele("import", "users/ann", folder)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1 and "expected 2, found 1" in err and "--fold-scale" in err
    assert Index.load(store.catalogue).next_revision("ann") == 2

    assert allele("import", "users/ann", folder, "--fold-scale")[0] == 0
    fact = Index.load(store.catalogue).newest("ann")
    assert fact is not None and fact.weights is not None
    for name, got in shape.views(shape.unpack(store.read(fact.weights))).items():
        np.testing.assert_array_equal(got, shape.views(row)[name] * (0.5 if ".lora_B." in name else 1))


@pytest.mark.parametrize("before", ["write_segments", "write_provenance"])
def test_two_imports_at_once_do_not_take_one_revision(
    store: PopulationStore,
    shape: AdapterShape,
    allele: Allele,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
) -> None:
    """Another begins and ends inside the first: before its start it is seen, after it the first one is fenced off."""
    trained(store, shape, "ann")
    folder = export_peft(shape.pack(values(shape, 1)), tmp_path / "f", shape=shape, scale=SCALE, base_name="tiny")
    real, inner = getattr(PopulationStore, before), list[tuple[int, str, str]]()

    def another_first(self: PopulationStore, *arguments: Any) -> Any:
        monkeypatch.setattr(PopulationStore, before, real)
        inner.append(allele("import", "users/ann", folder))
        return real(self, *arguments)

    monkeypatch.setattr(PopulationStore, before, another_first)
    code, out, err = allele("import", "users/ann", folder)
    assert inner[0][0] == 0 and inner[0][1].startswith("users/ann@2 ")
    if before == "write_segments":
        assert code == 0 and out.startswith("users/ann@3 ")
    else:
        assert code == 1 and "a newer driver of this run has started" in err
        assert Index.load(store.catalogue).next_revision("ann") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("users/ann@1",), "expected population/member, found a revision"),
        (("users/ann", "--group", "b"), "is of group 'a', found 'b'"),
        (("users/bob", "--group", "b"), "--group: expected one of a, found b"),
        (("others/ann",), "others/population.json: expected the population's record, found none"),
        (("no slash",), "expected population/member"),
    ],
)
def test_a_wrong_target_is_refused_in_one_line(
    store: PopulationStore, shape: AdapterShape, allele: Allele, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    trained(store, shape, "ann")
    folder = export_peft(shape.pack(values(shape, 1)), tmp_path / "f", shape=shape, scale=SCALE, base_name="tiny")
    code, out, err = allele("import", words[0], folder, *words[1:])
    assert (code, out) == (1, "")
    assert err.count("\n") == 1 and message in err
    assert list(Index.load(store.catalogue).members()) == ["ann"]


def test_a_folder_of_another_shape_is_refused_in_one_line(
    store: PopulationStore, shape: AdapterShape, allele: Allele, tmp_path: Path
) -> None:
    trained(store, shape, "ann")
    tensors = shape.views(values(shape, 1)) | {"a\nb": np.ones(3, dtype="<f4")}
    code, _, err = allele("import", "users/ann", save(tmp_path / "f", tensors))
    assert code == 1
    assert err.count("\n") == 1 and r"a\nb: expected a LoRA matrix of a target module, found F32 [3]" in err


def test_a_population_without_revisions_and_one_over_factors_take_no_imports(
    store: PopulationStore, shape: AdapterShape, allele: Allele, tmp_path: Path
) -> None:
    folder = export_peft(shape.pack(values(shape, 1)), tmp_path / "f", shape=shape, scale=SCALE, base_name="tiny")
    assert "expected a revision to take rank and scale from, found none" in allele("import", "users/ann", folder)[2]
    trained(store, shape, "ann", init="PiSSA", base_mode="SharedResidual")
    assert "expected baseMode Untouched, found SharedResidual" in allele("import", "users/ann", folder)[2]
    assert Index.load(store.catalogue).next_revision("ann") == 2


def test_a_group_whose_shape_changed_behind_its_record_takes_no_imports(
    store: PopulationStore, shape: AdapterShape, allele: Allele, tmp_path: Path
) -> None:
    trained(store, shape, "ann", rank=8)
    folder = export_peft(shape.pack(values(shape, 1)), tmp_path / "f", shape=shape, scale=SCALE, base_name="tiny")
    code, _, err = allele("import", "users/ann", folder)
    assert code == 1 and err.count("\n") == 1 and f"shape {shape.digest}, found" in err
