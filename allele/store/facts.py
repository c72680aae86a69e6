"""Facts: the rows of a population's catalogue, in Python and in Arrow.

A fact is never changed or removed; what a member is now follows from its facts in order of `(time, run, step)`.
`time` never goes back within a table (writers push theirs past the newest one seen), so that order is the same for a
reader that tailed the log and one that loads a compacted table.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from allele.protocol.adapters import MEMBER_NAME
from allele.protocol.commands import ByteRange
from allele.protocol.errors import InvalidRequest
from allele.store.errors import InvalidFact

Kind = Literal["Committed", "Exposed", "Held", "Pinned", "Unpinned", "Abandoned", "Retired"]
KINDS: tuple[str, ...] = typing.get_args(Kind)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What happened to one revision of one member; which fields are set depends on `kind`.

    Committed: the revision exists (a second one for the same revision may add its state). Exposed: it is what is
    served. Held: serve this revision and expose no other; a Held without revision lifts it. Pinned: keep its bytes,
    until Unpinned. Abandoned: it belongs to a branch that was not resumed. Retired: its bytes may be gone.
    """

    kind: Kind
    member: str
    revision: int | None = None
    group: str = ""
    step: int | None = None
    """Step of the run; the writer fills in that of the commit."""
    parent: int | None = None
    """Revision that this one was trained from; None: the base."""
    digest: str | None = None
    segment: str | None = None
    offset: int | None = None
    length: int | None = None
    state_digest: str | None = None
    state_segment: str | None = None
    state_offset: int | None = None
    state_length: int | None = None
    run: str = ""
    """Uid of the run; filled in by the writer, as are `fence` and `time`; a fact that is said again keeps its own."""
    fence: int = 0
    probe: tuple[float, ...] | None = None
    """The trainer's logprobs of the provenance's probe sequences, under the exported bytes."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    provenance: str | None = None
    shape: str | None = None
    reason: str | None = None
    time: datetime | None = None

    @classmethod
    def committed(
        cls, *, member: str, revision: int, weights: ByteRange, state: ByteRange | None = None, **fields: Any
    ) -> Fact:
        """A Committed fact of the ranges that the trainer returned."""
        if state is not None:
            fields |= {
                "state_segment": state.path,
                "state_offset": state.offset,
                "state_length": state.length,
                "state_digest": state.digest,
            }
        return cls(
            kind="Committed",
            member=member,
            revision=revision,
            segment=weights.path,
            offset=weights.offset,
            length=weights.length,
            digest=weights.digest,
            **fields,
        )

    @property
    def weights(self) -> ByteRange | None:
        """Where the packed adapter is."""
        if self.segment is None or self.offset is None or self.length is None or self.digest is None:
            return None
        return ByteRange(path=self.segment, offset=self.offset, length=self.length, digest=self.digest)

    @property
    def state(self) -> ByteRange | None:
        """Where the training state is."""
        if self.state_segment is None or self.state_offset is None or self.state_length is None:
            return None
        if self.state_digest is None:
            return None
        return ByteRange(
            path=self.state_segment, offset=self.state_offset, length=self.state_length, digest=self.state_digest
        )

    @property
    def order(self) -> tuple[datetime, str, int, int]:
        """Facts of a member in the order in which they count."""
        assert self.time is not None, "a fact has a time once it is committed"
        return (self.time, self.run, self.step or 0, self.revision or 0)


SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("member", pa.string()),
        pa.field("group", pa.string()),
        pa.field("revision", pa.int64()),
        pa.field("step", pa.int64()),
        pa.field("parent", pa.int64()),
        pa.field("digest", pa.string()),
        pa.field("segment", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("state_digest", pa.string()),
        pa.field("state_segment", pa.string()),
        pa.field("state_offset", pa.int64()),
        pa.field("state_length", pa.int64()),
        pa.field("run", pa.string()),
        pa.field("fence", pa.int64()),
        pa.field("probe", pa.list_(pa.float32())),
        pa.field("metrics", pa.map_(pa.string(), pa.float64())),
        pa.field("provenance", pa.string()),
        pa.field("shape", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("time", pa.timestamp("us", "UTC")),
    ]
)
"""Columns of the catalogue. The table outlives versions of this code, so columns are only ever added, at the end and
nullable, never renamed, retyped or removed; so are kinds of facts. A reader takes a column that a file has not for
null, and leaves out columns and kinds that it does not know; a writer adds the columns that the table has not when it
starts."""


def to_arrow(facts: Iterable[Fact]) -> pa.Table:
    rows = list(facts)
    columns = {name: [getattr(f, name) for f in rows] for name in SCHEMA.names}
    columns["metrics"] = [list(f.metrics.items()) for f in rows]
    return pa.table([pa.array(columns[f.name], type=f.type) for f in SCHEMA], schema=SCHEMA)


def from_arrow(table: pa.Table) -> Iterator[Fact]:
    """Rows of a table with SCHEMA's columns (any integer or string width), in its order."""
    for batch in table.select(SCHEMA.names).to_batches(max_chunksize=16_384):
        columns = [batch.column(i).to_pylist() for i in range(len(SCHEMA))]
        for row in zip(*columns, strict=True):
            yield from_row(dict(zip(SCHEMA.names, row, strict=True)))


def from_row(values: dict[str, Any]) -> Fact:
    """The inverse of a row of `to_arrow`."""
    values["metrics"] = dict(values["metrics"] or ())
    values["probe"] = None if values["probe"] is None else tuple(values["probe"])
    return Fact(**values)


def check(facts: Iterable[Fact]) -> None:
    """Raise InvalidRequest for a bad member name, InvalidFact for a fact that lacks what its kind needs."""
    seen: set[tuple[str, str, int | None]] = set()
    for i, f in enumerate(facts):
        if not MEMBER_NAME.fullmatch(f.member):
            raise InvalidRequest(
                f"facts[{i}].member: expected 1 to 63 of A-Z a-z 0-9 . _ - (first and last a letter or digit), "
                f"found {f.member!r}"
            )
        if f.kind not in KINDS:
            raise InvalidFact(f"facts[{i}].kind: expected one of {', '.join(KINDS)}, found {f.kind!r}")
        if f.kind != "Held" and (f.revision is None or f.revision < 1):
            raise InvalidFact(f"facts[{i}] ({f.kind} of {f.member}): revision: expected 1 or more, found {f.revision}")
        if f.kind == "Committed" and (f.weights is None or f.shape is None):
            raise InvalidFact(f"facts[{i}] (Committed of {f.member}): expected byte range, digest and shape, found {f}")
        key = (f.kind, f.member, f.revision)
        if key in seen:
            raise InvalidFact(f"facts[{i}]: {f.kind} of {f.member}@{f.revision} is in this commit twice")
        seen.add(key)


def now() -> datetime:
    return datetime.now(UTC)
