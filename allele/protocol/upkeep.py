"""What a Job that erases or collects a population's folder says at its end, as its termination message.

The operator turns it into a condition. Kubernetes keeps 4,096 bytes of it, so it holds counts and one sentence.
"""

from __future__ import annotations

from pydantic import Field

from allele.protocol.wire import Wire

MESSAGE_LIMIT = 1024
"""Characters of a message."""


class _Report(Wire):
    reason: str = Field(max_length=128)
    """One word: what was done, or the type of the error."""
    message: str = Field(max_length=MESSAGE_LIMIT)


class ErasureReport(_Report):
    """`erased`: nothing of this population is left, because it was deleted, never there, or is another's by now."""

    erased: bool
    objects: int = 0
    """Deleted by this attempt."""
    size: int = 0
    """Their bytes."""


class CollectionReport(_Report):
    """`collected`: the pass went through and found nothing damaged."""

    collected: bool
    retired: int = 0
    """Revisions."""
    dropped: int = 0
    """Training states."""
    compacted: int = 0
    """Objects of which less than half was needed."""
    deleted: int = 0
    """Objects."""
    size: int = 0
    """Bytes of the deleted objects."""
    damaged: int = 0
    """Objects that stay as they are because their bytes are not those recorded."""
