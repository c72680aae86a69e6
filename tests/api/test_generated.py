"""The generator: what is committed is what the models say, and what a CRD cannot say is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from allele.api import crds
from allele.api.kinds import KINDS, POOL, Kind
from allele.api.schema import Model

FOLDER = Path(__file__).parents[2] / "crds"


def test_the_committed_files_are_what_the_models_say() -> None:
    assert crds.main(["--out", str(FOLDER), "--check"]) == 0


def test_check_fails_on_a_changed_a_missing_and_a_foreign_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crds.main(["--out", str(tmp_path)]) == 0
    file = tmp_path / "basepools.allele.dev.yaml"
    file.write_text(file.read_text() + "\n")
    assert crds.main(["--out", str(tmp_path), "--check"]) == 1
    assert "basepools.allele.dev.yaml" in capsys.readouterr().err
    file.unlink()
    assert crds.main(["--out", str(tmp_path), "--check"]) == 1
    assert not file.exists()
    crds.main(["--out", str(tmp_path)])
    (tmp_path / "old.yaml").write_text("")
    assert crds.main(["--out", str(tmp_path), "--check"]) == 1
    crds.main(["--out", str(tmp_path)])
    assert not (tmp_path / "old.yaml").exists()


def _walk(schema: Any, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        yield at, schema
        for key, value in schema.items():
            yield from _walk(value, f"{at}.{key}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_schemas_are_structural(kind: Kind) -> None:
    root = crds.crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for at, schema in _walk(root, kind.kind):
        assert not {"$ref", "allOf", "oneOf", "const", "title"} & schema.keys() or at.endswith("properties"), at
        if "anyOf" in schema and not at.endswith("properties"):
            assert schema.get("x-kubernetes-int-or-string"), at
        if not isinstance(schema.get("exclusiveMinimum", True), bool):
            pytest.fail(f"{at}: exclusiveMinimum is a number")


def test_files_have_no_anchors_and_load_as_one_object_each() -> None:
    for text in crds.render().values():
        assert "&id" not in text
        assert yaml.safe_load(text)["kind"] == "CustomResourceDefinition"


class _Bare(Model):
    nothing: int = 3


class _Endless(Model):
    names: list[str] = Field(description="Names.")


class _Either(Model):
    value: int | list[int] = Field(description="One or many.")


class _Tree(Model):
    below: _Tree | None = Field(None, description="Itself.")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (_Bare, "BasePool.spec.nothing: no description"),
        (_Endless, "BasePool.spec.names: no maxItems; BasePool.spec.names[]: no maxLength"),
        (_Either, "BasePool.spec.value: a union of 2 types"),
        (_Tree, "type _Tree is recursive"),
    ],
)
def test_what_a_crd_cannot_say_is_refused(spec: type[Model], message: str) -> None:
    kind = Kind(POOL.kind, POOL.plural, POOL.short, spec, POOL.status, POOL.description, POOL.columns)
    with pytest.raises(crds.Unsupported, match=message.replace("[", r"\[")):
        crds.crd(kind)
