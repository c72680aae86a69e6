"""Bodies of commands to values and back; what is wrong is named by field."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from allele.protocol.errors import InvalidRequest

M = TypeVar("M", bound=BaseModel)


def parsed(model: type[M], body: bytes) -> M:
    """Raises InvalidRequest."""
    try:
        return model.model_validate_json(body)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"])) or "body"
        raise InvalidRequest(f"{field}: {first['msg']}, found {str(first['input'])[:200]!r}") from e


def encoded(reply: BaseModel) -> bytes:
    return reply.model_dump_json().encode()
