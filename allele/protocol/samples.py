"""Token ids and logprobs between roles: Arrow IPC streams, with the command as JSON in the schema's metadata.

Token in, token out: training uses exactly the ids and logprobs that the engine returned; nothing is re-tokenised.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from allele.protocol.errors import InvalidRequest
from allele.protocol.serving import Prefix
from allele.protocol.wire import Wire

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
_HEADER = b"allele"

PROMPTS = pa.schema(
    [
        pa.field("member", pa.string()),
        pa.field("revision", pa.int64()),
        pa.field("prompt", pa.list_(pa.int32())),
    ]
)
"""`POST /v1/generate` of a gateway; a null revision samples the base without an adapter."""

COMPLETIONS = pa.schema(
    [
        pa.field("request", pa.int32()),
        pa.field("completion", pa.list_(pa.int32())),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("finish", pa.string()),
        pa.field("error", pa.string()),
        pa.field("revision", pa.int64()),
        pa.field("experts", pa.list_(pa.int16())),
    ]
)
"""Its answer: `n` rows per request row, in request order; `error` is null unless that sample failed.

`revision` made every token of the sample (null: the base): an engine keeps a request's adapter until its end, so one
number a sample says for each token which policy it came from. `experts`: as in TRAIN, when the header asked for them.
"""

TRAIN = pa.schema(
    [
        pa.field("member", pa.string(), nullable=False),
        pa.field("loss", pa.int32(), nullable=False),
        pa.field("prompt", pa.list_(pa.int32()), nullable=False),
        pa.field("completion", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("advantage", pa.float32()),
        pa.field("pair", pa.int32()),
        pa.field("reference", pa.list_(pa.float32())),
        pa.field("teacher_prompt", pa.list_(pa.int32())),
        pa.field("teacher_ids", pa.list_(pa.int32())),
        pa.field("teacher_logprobs", pa.list_(pa.float32())),
        pa.field("experts", pa.list_(pa.int16())),
    ]
)
"""`POST /v1/forward_backward` of a trainer. What the row's loss (its place in the command's `losses`) has no use for is
null or left out of `encode`.

`logprobs`, `advantage`: the sampling policy's, per completion token, and of the sample (a reward, where the loss
whitens). `pair`: two rows side by side with the same number, the first one preferred. `reference`: logprobs of the
reference policy, per completion token; null: the base's. `teacher_prompt`: what the base as teacher sees in place of
the prompt. `teacher_ids`, `teacher_logprobs`: a given teacher's top_k at each completion token, one token
after the other.

`experts`, for a model that has them: those that the engine chose, of every token but the last, `[tokens − 1, layers,
experts per token]` flattened; −1 where the engine does not know: there the trainer's router chooses and the token's
loss does not count. Null where nothing is to be replayed.
"""


class Generate(Wire):
    """Header of a PROMPTS batch."""

    namespace: str
    population: str
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    version: int | None = None
    """Catalogue version that the gateway must have seen before it resolves revisions."""
    experts: bool = False
    """Whether to return the experts that each token took; InvalidRequest from an engine that does not tell."""
    request_prefix: Prefix | Literal[""] = ""
    """Name of the batch, by which `/v1/abort` finds it; several may share one."""


class Generated(Wire):
    """Header of a COMPLETIONS batch."""

    engine: Literal["sglang"] = "sglang"
    seconds: float


H = TypeVar("H", bound=BaseModel)


def encode(header: BaseModel, schema: pa.Schema, columns: dict[str, list[object]]) -> bytes:
    """One record batch as an IPC stream; a column that is nullable may be left out."""
    schema = schema.with_metadata({_HEADER: header.model_dump_json().encode()})
    rows = len(columns[schema.names[0]])
    arrays = [
        pa.nulls(rows, f.type) if f.nullable and f.name not in columns else pa.array(columns[f.name], type=f.type)
        for f in schema
    ]
    batch = pa.record_batch(arrays, schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def decode(data: bytes, header: type[H], schema: pa.Schema) -> tuple[H, pa.Table]:
    """The inverse of `encode`. Raises InvalidRequest for other bytes, columns or header."""
    try:
        with pa.ipc.open_stream(data) as reader:
            table = reader.read_all()
        parsed = header.model_validate_json((table.schema.metadata or {})[_HEADER])
    except (pa.ArrowInvalid, KeyError, ValidationError) as e:
        raise InvalidRequest(f"body: expected an Arrow stream with a {header.__name__} header: {e}") from e
    if not table.schema.remove_metadata().equals(schema):
        raise InvalidRequest(
            f"columns: expected {schema.names}, found {table.schema.to_string(show_schema_metadata=False)!r}"
        )
    return parsed, table
