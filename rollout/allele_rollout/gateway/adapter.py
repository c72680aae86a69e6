"""An adapter as a gateway knows it: what its bytes must be, what the engine calls it, where they come from."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A revision."""

    name: AdapterName
    weights: ByteRange
    """Of the packed adapter in the store."""
    config: bytes
    """PEFT's adapter_config.json."""
    shelf: Shelf = dataclasses.field(compare=False, repr=False)

    @property
    def engine_name(self) -> str:
        """What the engine calls it: with the digests, a population made anew never meets old weights, and the same
        bytes under another alpha are another adapter."""
        return f"{self.name}#{self.weights.digest[:16]}-{hashlib.sha256(self.config).hexdigest()[:8]}"
