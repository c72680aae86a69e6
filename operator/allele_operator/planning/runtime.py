"""AdapterRuntime: says whether its pieces contradict what the operator itself sets in every pod."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from allele.api.runtime import AdapterRuntimeSpec
from allele_operator.planning import observe
from allele_operator.planning.conditions import Found, events, merged
from allele_operator.planning.model import GROUP_PREFIX, Obj, Plan, World
from allele_operator.planning.render.pods import RESERVED_VARIABLES

OWN_ENGINE_ARGUMENTS = (
    *("--model-path", "--host", "--port", "--enable-lora", "--max-loras-per-batch", "--max-lora-rank"),
    "--lora-target-modules",
)
"""Arguments of the engine that follow from the pool; the runtime may not set them."""


def plan(runtime: Obj, world: World, now: datetime) -> Plan:
    if observe.deleting(runtime):
        return Plan()
    spec = AdapterRuntimeSpec.model_validate(runtime["spec"])
    if problem := "; ".join(_problems(spec)):
        found = Found("Valid", False, "ReservedPiece", problem, "Warning")
    else:
        found = Found("Valid", True, "Valid", "pools can be made from it")
    status = {
        "observedGeneration": runtime["metadata"].get("generation", 0),
        "phase": "Valid" if found.status else "Invalid",
        "conditions": merged(runtime, [found], now),
    }
    return Plan(status=status, events=events(runtime, [found]))


def _problems(spec: AdapterRuntimeSpec) -> Iterator[str]:
    for variable in spec.pod_template.env:
        if variable.name in RESERVED_VARIABLES:
            yield f"spec.podTemplate.env: {variable.name} is set by the operator, remove it"
    for argument in spec.engine.args:
        name = argument.split("=")[0].split(" ")[0]
        if name in OWN_ENGINE_ARGUMENTS:
            yield f"spec.engine.args: {name} follows from the pool, remove it"
    for label in spec.pod_template.labels:
        if label.startswith(GROUP_PREFIX):
            yield f"spec.podTemplate.labels: {label} belongs to the operator, remove it"
