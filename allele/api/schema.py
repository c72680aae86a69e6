"""Building blocks of resource models: camelCase on the wire, CEL rules and list types beside the fields.

Kubernetes accepts only structural schemas; `allele.api.crds` turns pydantic's JSON schema into one and refuses what it
cannot express. Every list, map and string has a bound, since CEL's cost estimate multiplies them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

GROUP = "allele.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"


class Model(BaseModel):
    """camelCase on the wire; unknown fields are ignored on read, so that an older operator reads newer objects."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


def cel(rule: str, message: str, *, path: str | None = None, reason: str | None = None) -> dict[str, Any]:
    """One CEL rule. `path` is relative to the annotated object, e.g. '.replicas'; `reason` is one of the API's four."""
    optional = {"fieldPath": path, "reason": reason}
    return {"rule": rule, "message": message} | {k: v for k, v in optional.items() if v is not None}


def schema(*rules: dict[str, Any], **extensions: Any) -> dict[str, Any]:
    """json_schema_extra of a field or model: CEL rules and x-kubernetes-* extensions (list_type="map", …)."""
    out: dict[str, Any] = {"x-kubernetes-" + k.replace("_", "-"): v for k, v in extensions.items()}
    return out | ({"x-kubernetes-validations": list(rules)} if rules else {})


_QUANTITY = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
Quantity = Annotated[
    int | str,
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": _QUANTITY,
            "maxLength": 32,
        }
    ),
]
Name = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
MemberName = Annotated[str, Field(max_length=63, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
Digest = Annotated[str, Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$")]
DottedPath = Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$|^[a-z][-a-z0-9]*$")]
Text = Annotated[str, Field(max_length=253)]
FreeForm = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})]


class Condition(Model):
    """One adjective about the object, with a reason for programs and a sentence for people."""

    type: str = Field(description="Name of the condition, an adjective.", max_length=316)
    status: str = Field(description="True, False or Unknown.", json_schema_extra={"enum": ["True", "False", "Unknown"]})
    reason: str = Field(description="One word for programs.", min_length=1, max_length=1024)
    message: str = Field("", description="A sentence for people.", max_length=32768)
    observed_generation: int = Field(
        0, description="Generation of the spec this was found for.", ge=0, json_schema_extra={"format": "int64"}
    )
    last_transition_time: str = Field(
        description="When the status last changed.", max_length=64, json_schema_extra={"format": "date-time"}
    )


Conditions = Annotated[
    list[Condition], Field(max_length=16, json_schema_extra=schema(list_type="map", list_map_keys=["type"]))
]


class Status(Model):
    """What every status has."""

    observed_generation: int = Field(
        0, description="Generation last reconciled.", ge=0, json_schema_extra={"format": "int64"}
    )
    phase: str = Field("", description="One word for people; programs read the conditions.", max_length=32)
    conditions: Conditions | None = Field(None, description="What is the case, and why.")
