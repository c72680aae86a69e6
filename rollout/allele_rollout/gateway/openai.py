"""OpenAI bodies at the tenant port: pure.

The engine speaks the OpenAI protocol itself; a body only needs the adapter's name in it. It carries the client's own
`model` on, because the engine echoes it in replies and in every streamed chunk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from allele.protocol.errors import InvalidRequest, NotExposed, NotFound, Overloaded, ProtocolError
from allele_rollout.gateway.bodies import Request

ENGINE_ONLY = frozenset(
    {
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "custom_labels",
        "custom_logit_processor",
        "custom_params",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "extra_key",
        "lora_path",
        "priority",
        "rid",
        "routed_dp_rank",
        "session_id",
        "session_params",
    }
)
"""Fields of the engine by which a tenant could reach other adapters, other requests, or code: dropped."""
OURS = frozenset({"vote"})

_TYPES = {
    NotFound: "invalid_request_error",
    NotExposed: "invalid_request_error",
    InvalidRequest: "invalid_request_error",
    Overloaded: "rate_limit_error",
}
_ENGINE_FIELD = re.compile(r"'loc': \('body', '(?P<field>\w+)'")
_ENGINE_WORDS = re.compile(r"\), 'msg': (?:'([^']*)'|\"([^\"]*)\")")
R = TypeVar("R", bound=Request)


class BadRequest(InvalidRequest):
    """At this port a wrong request is 400, as OpenAI's clients expect it."""

    status = 400


def parse_body(data: bytes, model: type[R]) -> tuple[dict[str, Any], R]:
    """Body of a completion request as it came, and as it was understood. Raises BadRequest."""
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise BadRequest(f"body: expected JSON: {e}") from e
    if not isinstance(body, dict):
        raise BadRequest(f"body: expected a JSON object, found {type(body).__name__}")
    try:
        return body, model.model_validate(body)
    except ValidationError as e:
        param, message = _first_error(e)
        raise BadRequest(message, param=param) from e


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"found {text}")


def _first_error(error: ValidationError) -> tuple[str, str]:
    """The field that is wrong, and what is wrong with it; a field of several forms has an error for each."""
    first, *others = error.errors(include_url=False, include_context=False)
    texts = [first["msg"].removeprefix("Value error, ")]
    if not first["loc"]:
        return texts[0].partition(":")[0], texts[0]
    param = str(first["loc"][0])
    texts += [e["msg"] for e in others if e["loc"][:1] == first["loc"][:1]]
    forms = "; or ".join(dict.fromkeys(t[:1].lower() + t[1:] for t in texts))
    where = ".".join(str(part) for part in first["loc"]) if len(texts) == 1 else param
    found = "" if first["type"] == "missing" else f", found {_short(first['input'])}"
    return param, f"{where}: {forms}{found}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def engine_body(body: dict[str, Any], adapter: str | None) -> dict[str, Any]:
    """What the engine gets: the client's body, under the engine's name of the adapter; a null is the default."""
    kept = {k: v for k, v in body.items() if k not in ENGINE_ONLY | OURS and v is not None}
    return kept if adapter is None else {**kept, "lora_path": adapter}


def engine_refusal(reason: str) -> BadRequest:
    """The engine's own check of a field as an error of ours; its words hold a path of its host."""
    if field := _ENGINE_FIELD.search(reason):
        words = _ENGINE_WORDS.search(reason, field.end())
        text = (words[1] or words[2]).removeprefix("Value error, ") if words else "not what the engine takes"
        return BadRequest(f"{field['field']}: {text}", param=field["field"])
    return BadRequest(f"engine: {reason}")


def error_body(error: ProtocolError) -> dict[str, Any]:
    """OpenAI's form of an error, with our class as its `code`."""
    kind = _TYPES.get(type(error), "server_error")
    code = "model_not_found" if isinstance(error, NotFound) else type(error).__name__
    param = "model" if isinstance(error, NotFound | NotExposed) else error.param
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def model_entry(model: str, *, owner: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": owner}


def model_page(models: Sequence[str], *, after: str | None, limit: int, owner: str) -> dict[str, Any]:
    """One page of /v1/models: the names that follow `after` in sorted order."""
    names = sorted(models)
    rest = [m for m in names if after is None or m > after]
    page = rest[:limit]
    return {
        "object": "list",
        "data": [model_entry(m, owner=owner) for m in page],
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
        "has_more": len(rest) > limit,
    }
