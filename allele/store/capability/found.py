"""What a probe finds, and what of it a store cannot do without."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from allele.protocol.wire import Wire

Reason = Literal[
    "Reachable",
    "BucketMissing",
    "CredentialsRefused",
    "Unreachable",
    "NoConditionalWrites",
    "NoRangedReads",
    "NoListing",
]


class Latency(Wire):
    """Milliseconds that one small request takes, the median of a few; as text in the order of the fields."""

    put: float
    get: float
    conditional_put: float

    def __str__(self) -> str:
        return f"{self.put:.3g}/{self.get:.3g}/{self.conditional_put:.3g} ms"


class Failed(Exception):
    """Why the store will not do."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class Found(BaseModel):
    """What is known so far."""

    create_only: bool = False
    if_match: bool = False
    ranged_read: bool = False
    list: bool = False
    """Lists what is there, and what comes after a name."""
    checksums: bool = False
    """Refuses bytes that are not those of the checksum sent with them. Nothing relies on it."""
    latency: Latency | None = None

    def require(self) -> None:
        """Raises Failed for what is missing."""
        if not (self.create_only and self.if_match):
            raise Failed(
                "NoConditionalWrites",
                "a condition on PUT (create only, or replace a known version) is ignored: two writers could overwrite "
                "each other's commits",
            )
        if not self.ranged_read:
            raise Failed("NoRangedReads", "Range on GET is ignored: members of a segment could not be read alone")
        if not self.list:
            raise Failed(
                "NoListing", "what a listing gives is not what comes after a name: new commits would not be found"
            )

    def result(self, *, reachable: bool, reason: Reason, message: str) -> Capabilities:
        return Capabilities(reachable=reachable, reason=reason, message=message, **dict(self))


class Capabilities(Found):
    """Result of a probe; the words of `reason` become the reason of the store's Reachable condition."""

    model_config = Wire.model_config

    reachable: bool
    reason: Reason
    message: str
