"""An adapter as a gateway knows it: what its bytes must be, what the engine calls it, where they come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Protocol

from allele.protocol.adapters import AdapterName
from allele.protocol.commands import ByteRange
from allele.protocol.errors import ProtocolError


class Shelf(Protocol):
    """Where a population's bytes are kept."""

    async def read(self, ranges: Sequence[ByteRange]) -> list[bytes | ProtocolError]:
        """The bytes of each range, their digests checked, or why there are none."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A revision. Two are equal when the engine may serve one for the other."""

    name: AdapterName
    weights: ByteRange
    """Of the packed adapter in the store."""
    config: bytes
    """PEFT's adapter_config.json."""
    shelf: Shelf = dataclasses.field(repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.engine_name == other.engine_name

    def __hash__(self) -> int:
        return hash(self.engine_name)

    @property
    def member(self) -> tuple[str, str, str]:
        """Namespace, population and member: the same for all revisions."""
        return self.name.namespace, self.name.population, self.name.member

    @functools.cached_property
    def engine_name(self) -> str:
        """What the engine calls it: with the digests, a population made anew never meets old weights, and the same
        bytes under another alpha are another adapter."""
        return f"{self.name}#{self.weights.digest[:16]}-{hashlib.sha256(self.config).hexdigest()[:8]}"
