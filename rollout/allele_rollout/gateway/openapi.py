"""OpenAPI documents of both ports, made from the models that check what comes and write what goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from allele.protocol.errors import ErrorReply
from allele.protocol.serving import AbortReply, AbortRequest, GatewayStatus, ProbeReply, ProbeRequest
from allele_rollout.gateway.answers import ChatCompletion, Completion, ErrorAnswer, Health, Model, ModelPage
from allele_rollout.gateway.bodies import ChatRequest, TextRequest

REVISION_HEADER = "x-allele-revision"
PAGE = 1000
_JSON = "application/json"
_REASONS = {
    400: "A field is wrong, or the body is not JSON; `param` names the field.",
    404: "No such population, member or revision.",
    409: "The member exists, none of its revisions is exposed yet.",
    413: "The body is too long.",
    422: "The request is wrong.",
    429: "The queue is full: come back after Retry-After seconds.",
    500: "A fault of the gateway.",
    502: "The adapter's bytes are damaged.",
    503: "The engine or the store does not answer: come back after Retry-After seconds.",
}


@dataclasses.dataclass(frozen=True)
class Route:
    """One operation."""

    method: str
    path: str
    summary: str
    answers: type[BaseModel]
    errors: Sequence[int]
    takes: type[BaseModel] | None = None
    streams: bool = False
    parameters: Sequence[dict[str, Any]] = ()


def _query(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


_COMPLETION_ERRORS = (400, 404, 409, 413, 429, 500, 502, 503)
TENANT = (
    Route(
        "post",
        "/v1/chat/completions",
        "Answer a conversation.",
        ChatCompletion,
        _COMPLETION_ERRORS,
        takes=ChatRequest,
        streams=True,
    ),
    Route(
        "post",
        "/v1/completions",
        "Go on with a text.",
        Completion,
        _COMPLETION_ERRORS,
        takes=TextRequest,
        streams=True,
    ),
    Route(
        "get",
        "/v1/models",
        "Models by page: the base, and each member with an exposed revision.",
        ModelPage,
        (400, 500, 503),
        parameters=(
            _query("limit", "Models of a page.", type="integer", minimum=1, maximum=PAGE, default=PAGE),
            _query("after", "The model before the page.", type="string"),
        ),
    ),
    Route(
        "get",
        "/v1/models/{model}",
        "One model.",
        Model,
        (400, 404, 409, 500, 503),
        parameters=(
            {
                "name": "model",
                "in": "path",
                "required": True,
                "description": "As in a request; its slashes may stand as they are.",
                "schema": {"type": "string", "minLength": 1},
            },
        ),
    ),
    Route("get", "/healthz", "Whether the engine answers.", Health, (500, 503)),
)
INTERNAL = (
    Route(
        "post",
        "/v1/probe",
        "Compare what revisions say with what was trained.",
        ProbeReply,
        (413, 422, 429, 500, 503),
        takes=ProbeRequest,
    ),
    Route("post", "/v1/abort", "Give up batches.", AbortReply, (413, 422, 500), takes=AbortRequest),
    Route("get", "/v1/status", "Engine, tiers, and catalogue versions seen.", GatewayStatus, (500,)),
    Route("get", "/healthz", "Whether the engine answers.", Health, (500, 503)),
)


def tenant_document() -> dict[str, Any]:
    return _document("Allele gateway, tenant port", TENANT, ErrorAnswer)


def internal_document() -> dict[str, Any]:
    return _document("Allele gateway, internal port (routes that speak JSON)", INTERNAL, ErrorReply)


def _document(title: str, routes: Sequence[Route], error: type[BaseModel]) -> dict[str, Any]:
    models: list[tuple[type[BaseModel], Any]] = [(error, "serialization")]
    for route in routes:
        models += [(route.takes, "validation")] if route.takes else []
        models.append((route.answers, "serialization"))
    references, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method] = _operation(route, error, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version("allele")},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }


def _operation(route: Route, error: type[BaseModel], references: Any) -> dict[str, Any]:
    def content(model: type[BaseModel], mode: str) -> dict[str, Any]:
        return {_JSON: {"schema": references[model, mode]}}

    good: dict[str, Any] = {"description": "The answer.", "content": content(route.answers, "serialization")}
    if route.streams:
        good["description"] = "The answer; with `stream` as chunks, server-sent events of which the last is [DONE]."
        good["content"]["text/event-stream"] = {}  # this version of OpenAPI has no words for events
        good["headers"] = {
            REVISION_HEADER: {"description": "Revision that answers; not with the base.", "schema": {"type": "integer"}}
        }
    found: dict[str, Any] = {"summary": route.summary, "responses": {"200": good}}
    if route.parameters:
        found["parameters"] = list(route.parameters)
    if route.takes:
        found["requestBody"] = {"required": True, "content": content(route.takes, "validation")}
    for status in route.errors:
        found["responses"][str(status)] = {
            "description": _REASONS[status],
            "content": content(error, "serialization"),
        }
    return found
