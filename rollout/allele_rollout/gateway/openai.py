"""OpenAI bodies at the tenant port: pure.

The engine speaks the OpenAI protocol itself; a body only needs the adapter's name in it. It carries the client's own
`model` on, because the engine echoes it in replies and in every streamed chunk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from allele.protocol.errors import InvalidRequest, NotExposed, NotFound, Overloaded, ProtocolError

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

_TYPES = {
    NotFound: "invalid_request_error",
    NotExposed: "invalid_request_error",
    InvalidRequest: "invalid_request_error",
    Overloaded: "rate_limit_error",
}


def parse_body(data: bytes) -> dict[str, Any]:
    """Body of a completion request. Raises InvalidRequest unless it is an object with a `model`."""
    try:
        body = json.loads(data)
    except ValueError as e:
        raise InvalidRequest(f"body: expected JSON: {e}") from e
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise InvalidRequest("model: expected a text, population/member or population/member@revision")
    return body


def engine_body(body: dict[str, Any], adapter: str | None) -> dict[str, Any]:
    """What the engine gets: the client's body, under the engine's name of the adapter."""
    kept = {k: v for k, v in body.items() if k not in ENGINE_ONLY}
    return kept if adapter is None else {**kept, "lora_path": adapter}


def error_body(error: ProtocolError) -> dict[str, Any]:
    """OpenAI's form of an error, with our class as its `code`."""
    kind = _TYPES.get(type(error), "server_error")
    code = "model_not_found" if isinstance(error, NotFound) else type(error).__name__
    param = "model" if isinstance(error, NotFound | NotExposed) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def model_page(models: Sequence[str], *, after: str | None, limit: int, owner: str) -> dict[str, Any]:
    """One page of /v1/models: the names that follow `after` in sorted order."""
    names = sorted(models)
    rest = [m for m in names if after is None or m > after]
    page = rest[:limit]
    return {
        "object": "list",
        "data": [{"id": m, "object": "model", "created": 0, "owned_by": owner} for m in page],
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
        "has_more": len(rest) > limit,
    }
