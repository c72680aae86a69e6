"""pydantic models → CustomResourceDefinitions: `python -m allele.api.crds --out crds/ [--check]`.

Kubernetes takes only structural schemas (OpenAPI 3.0 without $ref, unions or null), and silently keeps a schema that
is merely useless: a field without description, or without the bound that CEL's cost estimate needs. What cannot be
expressed, described or bounded raises `Unsupported` here instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from allele.api.kinds import KINDS, Column, Kind
from allele.api.schema import GROUP, VERSION, Model, Status

Schema = dict[str, Any]
_DROPPED = {"title", "examples", "discriminator"}
_KEPT = {
    *("type", "description", "enum", "default", "format", "pattern", "minimum", "maximum", "multipleOf"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "required"),
    *("exclusiveMinimum", "exclusiveMaximum"),
}
_INHERITED = {Model.__doc__, Status.__doc__}


class Unsupported(ValueError):
    """The model says something that a CRD cannot; the message names the field."""


def structural(source: Any, defs: Schema, at: str, seen: tuple[str, ...] = ()) -> Schema:
    """JSON schema (2020-12, as pydantic writes it) → structural schema; `defs` are its $defs, `at` is for errors."""
    if source is True or source == {}:
        return {"x-kubernetes-preserve-unknown-fields": True}
    schema = dict(source)
    if "$ref" in schema:
        return _inlined(schema, defs, at, seen)
    if "x-kubernetes-int-or-string" in schema:  # exactly this anyOf, and no type, is allowed
        kept = ("anyOf", "description", "default", "pattern", "maxLength")
        return {k: v for k, v in schema.items() if k.startswith("x-kubernetes-") or k in kept}
    if "anyOf" in schema:
        return structural(_without_null(schema, at), defs, at, seen)
    out = {k: v for k, v in schema.items() if k.startswith("x-kubernetes-")}
    for key, value in _openapi3(schema).items():
        if key == "properties":
            out[key] = _properties(value, schema.get("required", ()), defs, at, seen)
        elif key == "items":
            out[key] = structural(value, defs, at + "[]", seen)
        elif key == "additionalProperties" and value is not False:  # False is what pruning does anyway
            out[key] = structural(value, defs, at + "{}", seen)
        elif key in _KEPT:
            if not (key == "default" and value is None):
                out[key] = value
        elif key not in _DROPPED and key not in out and key != "additionalProperties":
            raise Unsupported(f"{at}: JSON schema keyword {key} has no structural form")
    if out.get("description") in _INHERITED:
        del out["description"]
    return out


def _inlined(schema: Schema, defs: Schema, at: str, seen: tuple[str, ...]) -> Schema:
    """The target of a $ref with its siblings (description, default) on top; both sides' rules are kept."""
    name = schema.pop("$ref").rsplit("/", 1)[1]
    if name in seen:
        raise Unsupported(f"{at}: type {name} is recursive; a structural schema is finite")
    target = structural(defs[name], defs, at, (*seen, name))
    siblings = structural(schema, defs, at, seen) if schema else {}
    siblings.pop("x-kubernetes-preserve-unknown-fields", None)
    rules = [r for part in (target, siblings) for r in part.get("x-kubernetes-validations", ())]
    return target | siblings | ({"x-kubernetes-validations": rules} if rules else {})


def _without_null(schema: Schema, at: str) -> Schema:
    """`X | None`: the field may be absent, never null (the API server prunes a client's null)."""
    branches = [b for b in schema.pop("anyOf") if b.get("type") != "null"]
    if len(branches) != 1:
        raise Unsupported(f"{at}: a union of {len(branches)} types; use optional fields and a CEL rule")
    if schema.get("default", ...) is None:
        del schema["default"]
    return {**branches[0], **schema}


def _openapi3(schema: Schema) -> Schema:
    """Keywords whose form differs between 2020-12 and OpenAPI 3.0."""
    out = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes-")}
    if "const" in out:
        out["enum"] = [out.pop("const")]
    for key, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if key in out:
            out[limit], out[key] = out[key], True
    if out.get("type") == "integer":
        out.setdefault("format", "int64")
    return out


def _properties(value: Schema, required: Any, defs: Schema, at: str, seen: tuple[str, ...]) -> Schema:
    """default_factory is not in pydantic's schema: without a default the defaults inside would never apply.

    It is spelled out, because the API server checks rules against it before it fills in what is inside.
    """
    out = {name: structural(schema, defs, f"{at}.{name}", seen) for name, schema in value.items()}
    for name, schema in value.items():
        if name in required or out[name].get("required"):
            continue
        if "$ref" in schema or ("additionalProperties" in schema and "anyOf" not in schema):
            fields = out[name].get("properties", {})
            out[name].setdefault("default", {k: field["default"] for k, field in fields.items() if "default" in field})
    return out


def holes(schema: Schema, at: str) -> Iterator[str]:
    """What `kubectl explain` could not explain, and what CEL's cost estimate would take for infinite."""
    for name, field in schema.get("properties", {}).items():
        where = f"{at}.{name}"
        if not field.get("description"):
            yield f"{where}: no description"
        yield from _unbounded(field, where)
        yield from holes(field, where)


def _unbounded(field: Schema, where: str) -> Iterator[str]:
    if field.get("type") == "array":
        if "maxItems" not in field:
            yield f"{where}: no maxItems"
        yield from _unbounded(field["items"], where + "[]")
        yield from holes(field["items"], where + "[]")
    if field.get("type") == "string" and not ({"maxLength", "enum"} & field.keys()):
        yield f"{where}: no maxLength"
    if "additionalProperties" in field:
        if "maxProperties" not in field:
            yield f"{where}: no maxProperties"
        yield from _unbounded(field["additionalProperties"], where + "{}")


def crd(kind: Kind) -> Schema:
    """The CustomResourceDefinition of a kind. Raises Unsupported with every hole of its models."""
    parts = {}
    for part, model in (("spec", kind.spec), ("status", kind.status)):
        source = model.model_json_schema(by_alias=True, mode="validation")
        parts[part] = structural(source, source.pop("$defs", {}), f"{kind.kind}.{part}")
        parts[part].setdefault("description", {"spec": "What is wanted.", "status": "What is the case."}[part])
    if found := [h for part, schema in parts.items() for h in holes(schema, f"{kind.kind}.{part}")]:
        raise Unsupported("; ".join(found))
    root: Schema = {
        "type": "object",
        "description": kind.description,
        "required": ["spec"],
        "properties": _root_properties() | parts,
    }
    if kind.rules:
        root["x-kubernetes-validations"] = list(kind.rules)
    names = {
        "kind": kind.kind,
        "listKind": kind.kind + "List",
        "plural": kind.plural,
        "singular": kind.kind.lower(),
        "shortNames": [kind.short],
        "categories": ["allele"],
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": root},
        "subresources": {"status": {}} | ({"scale": kind.scale} if kind.scale else {}),
        "additionalPrinterColumns": [_column(c) for c in kind.columns]
        + [{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def _root_properties() -> Schema:
    return {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}


def _column(column: Column) -> Schema:
    out: Schema = {
        "name": column.name,
        "type": column.type,
        "jsonPath": column.path,
        "description": column.description,
    }
    return out | ({"priority": column.priority} if column.priority else {})


class _Dumper(yaml.SafeDumper):
    """Shared sub-schemas must not become YAML anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render() -> dict[str, str]:
    """File name → YAML, one file a kind."""
    header = "# Written by `make crds` from allele/api; do not edit.\n"
    return {
        f"{kind.plural}.{GROUP}.yaml": header
        + yaml.dump(crd(kind), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
        for kind in KINDS
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m allele.api.crds", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the YAML files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    options = parser.parse_args(argv)
    files = render()
    stale = [n for n, text in files.items() if _read(options.out / n) != text]
    extra = sorted(p.name for p in options.out.glob("*.yaml") if p.name not in files)
    if options.check:
        if stale or extra:
            print(f"{options.out} differs from allele/api ({', '.join(stale + extra)}): run make crds", file=sys.stderr)
        return 1 if stale or extra else 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (options.out / name).write_text(files[name])
    for name in extra:
        (options.out / name).unlink()
    return 0


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
