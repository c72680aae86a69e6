"""A group that goes with another base, or whose fields do not go together, is refused before anything is sampled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from allele.api.population import Group
from allele.format import AdapterShape
from allele.protocol.bundle import RunBundle
from allele.protocol.initialisation import RESIDUAL, Residual
from allele.store import PopulationStore
from allele_driver.loop.setup import Base, claim, read_base
from allele_driver.members import InvalidInput, adapter_of
from tests.driver.driver_parts import BASE, DIGEST, bundle

SOURCE = "sha256:" + "5" * 64
RESIDUAL_OF = Residual(
    source_digest=SOURCE,
    kind="PiSSA",
    rank=8,
    alpha=16,
    scaling="Standard",
    targets=("q_proj", "v_proj"),
    factors="f" * 64,
)


def given(kind: str, mode: str, **adapter: Any) -> RunBundle:
    found = bundle("init", uid="uid", members=2, steps=1)
    spec = found.population_spec.model_dump(by_alias=True)
    init = {"targets": ["v_proj", "q_proj"], "init": {"kind": kind, "baseMode": mode}}
    spec["groups"][0]["adapter"] = init | adapter
    return RunBundle.model_validate(found.model_dump(by_alias=True) | {"populationSpec": spec})


@pytest.fixture
def store(tmp_path: Path) -> PopulationStore:
    return PopulationStore.open(f"file://{tmp_path}/store", namespace="team", population="p")


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return read_base(f"file://{BASE}")


@pytest.fixture
def residual(tmp_path: Path) -> Base:
    folder = tmp_path / "residual"
    shutil.copytree(BASE, folder)
    (folder / RESIDUAL).write_text(RESIDUAL_OF.model_dump_json())
    return read_base(f"file://{folder}")


@pytest.mark.parametrize(
    ("kind", "mode", "change"),
    [
        ("PiSSA", "SharedResidual", {"rank": 4}),
        ("PiSSA", "SharedResidual", {"alpha": 8}),
        ("PiSSA", "SharedResidual", {"scaling": "RankStabilised"}),
        ("PiSSA", "SharedResidual", {"targets": ["q_proj"]}),
        ("OLoRA", "SharedResidual", {}),
        ("PiSSA", "Rank2r", {}),
        ("MiCA", "Untouched", {}),
        ("Standard", "Untouched", {}),
    ],
)
def test_a_group_of_another_base_is_refused_with_both_digests(
    store: PopulationStore, residual: Base, kind: str, mode: str, change: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput, match=f"groups.*adapter: init {kind}, {mode}: expected") as refused:
        claim(store, given(kind, mode, **change), residual)
    assert SOURCE in str(refused.value) and DIGEST in str(refused.value)
    assert store.record() is None


def test_a_shared_residual_over_the_base_itself_is_refused(store: PopulationStore, base: Base) -> None:
    with pytest.raises(InvalidInput, match=f"expected a residual base of {DIGEST} after PiSSA of rank 8, scale 2"):
        claim(store, given("PiSSA", "SharedResidual"), base)


def test_what_goes_together_is_claimed_with_the_rank_that_is_stored(store: PopulationStore, base: Base) -> None:
    claim(store, given("PiSSA", "Rank2r"), base)
    record = store.record()
    assert record is not None
    shape = AdapterShape.from_model(
        json.loads((BASE / "config.json").read_text()), rank=16, targets=["q_proj", "v_proj"]
    )
    assert list(record.shapes.values()) == [shape.digest]
    assert list(record.inits.values()) == ["PiSSA Rank2r"]


def test_the_same_adapter_written_otherwise_goes_with_the_residual_base(store: PopulationStore, residual: Base) -> None:
    claim(store, given("PiSSA", "SharedResidual", alpha=2, scaling="Fixed"), residual)
    assert store.record() is not None


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"init": {"kind": "MiCA", "baseMode": "Rank2r"}}, "expected baseMode Untouched with kind MiCA, found Rank2r"),
        ({"init": {"kind": "PiSSA"}}, "expected baseMode SharedResidual or Rank2r with kind PiSSA, found Untouched"),
        ({"rank": 256, "init": {"kind": "PiSSA", "baseMode": "Rank2r"}}, "at most 128 with baseMode Rank2r, found 256"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_without_an_api_server(adapter: dict[str, Any], words: str) -> None:
    group = Group.model_validate({"name": "g", "members": {"count": 1}, "adapter": adapter})
    with pytest.raises(InvalidInput, match=f"groups.g.adapter: .*{words}"):
        adapter_of(group)
