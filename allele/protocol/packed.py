"""Packed adapters by their digest: `POST /v1/packed` of a trainer, with a PackedRequest as JSON.

A gateway asks for what was just exported without waiting for the store. The answer is an Arrow stream of PACKED; what
the trainer no longer has, or what would make the answer larger than ANSWER_BYTES, is left out. Whoever asks checks
every digest, as it does for bytes from the store.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from pydantic import Field

from allele.protocol.errors import InvalidRequest
from allele.protocol.wire import Wire

PACKED = pa.schema(
    [pa.field("digest", pa.string(), nullable=False), pa.field("data", pa.large_binary(), nullable=False)]
)
MEDIA_TYPE = "application/vnd.apache.arrow.stream"
ANSWER_BYTES = 256 << 20


class PackedRequest(Wire):
    digests: tuple[str, ...] = Field(max_length=4096)
    """sha256 (hex) of the packed bytes."""


def encode_packed(found: Mapping[str, bytes]) -> memoryview:
    arrays = [pa.array(list(found), PACKED.field(0).type), pa.array(list(found.values()), PACKED.field(1).type)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, PACKED) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=PACKED))
    return memoryview(sink.getvalue())


def decode_packed(data: bytes) -> dict[str, bytes]:
    """Raises InvalidRequest for bytes that `encode_packed` did not make."""
    try:
        with pa.ipc.open_stream(data) as reader:
            table = reader.read_all()
    except pa.ArrowInvalid as e:
        raise InvalidRequest(f"body: expected an Arrow stream of {PACKED.names}: {e}") from e
    if not table.schema.equals(PACKED):
        raise InvalidRequest(f"columns: expected {PACKED.names}, found {table.schema.names}")
    return dict(zip(table["digest"].to_pylist(), table["data"].to_pylist(), strict=True))
