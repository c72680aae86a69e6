"""Resource files as models, with the file and the field in every complaint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from allele.api.population import AdapterPopulationSpec
from allele.api.run import RLRunSpec
from allele.api.schema import API_VERSION
from allele_cli.failure import Failure

S = TypeVar("S", bound=BaseModel)


@dataclasses.dataclass(frozen=True)
class Documents:
    """Objects of some files, by kind."""

    objects: dict[str, dict[str, Any]]

    def spec(self, kind: str, model: type[S]) -> tuple[str, S]:
        """Name and spec of the one object of `kind`. Raises Failure when it is absent or invalid."""
        if kind not in self.objects:
            raise Failure(f"expected a {kind} among the files, found {sorted(self.objects) or 'nothing'}")
        obj = self.objects[kind]
        name = obj["metadata"]["name"]
        try:
            return name, model.model_validate(obj.get("spec", {}))
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise Failure(f"{kind}/{name}: spec.{where}: {first['msg']}, found {first['input']!r}") from e

    def population(self) -> tuple[str, AdapterPopulationSpec]:
        return self.spec("AdapterPopulation", AdapterPopulationSpec)

    def run(self) -> tuple[str, RLRunSpec]:
        return self.spec("RLRun", RLRunSpec)


def load(paths: Iterable[Path]) -> Documents:
    """Read YAML files; two objects of one kind are refused, since a command works on one of each."""
    objects: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            documents = [d for d in yaml.safe_load_all(path.read_text()) if d]
        except (OSError, yaml.YAMLError) as e:
            raise Failure(f"{path}: cannot be read as YAML: {e}") from e
        for obj in documents:
            if not isinstance(obj, dict) or "kind" not in obj or "name" not in obj.get("metadata", {}):
                raise Failure(f"{path}: expected objects with kind and metadata.name, found {str(obj)[:60]!r}")
            if obj.get("apiVersion") == API_VERSION and obj["kind"] in objects:
                raise Failure(f"{path}: a second {obj['kind']}; give one")
            objects[obj["kind"]] = obj
    return Documents(objects)
