"""Errors that travel between roles.

Every HTTP API of ours answers a failure with `ErrorReply` as JSON and the status of its class. A client turns it back
into the same class with `raise_reply`, so that `except StaleEpoch` works on both sides of a connection.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class ErrorReply(BaseModel):
    """Body of every error answer."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    retry_after: float | None = None


class ProtocolError(Exception):
    """Base of the typed errors: `status` is the HTTP status, the class name is the code on the wire.

    `param` is the field of a tenant's request that is wrong; only the OpenAI form of an error carries it.
    """

    status: ClassVar[int] = 500

    def __init__(self, message: str, *, retry_after: float | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.param = param

    def reply(self) -> ErrorReply:
        return ErrorReply(code=type(self).__name__, message=str(self), retry_after=self.retry_after)


class InvalidRequest(ProtocolError):
    """The request itself is wrong: the message names the field, what was expected and what was found."""

    status = 422


class NotFound(ProtocolError):
    """An unknown population, member, revision or run."""

    status = 404


class NotExposed(ProtocolError):
    """The member exists but has no exposed revision."""

    status = 409


class StaleEpoch(ProtocolError):
    """An older driver of the run: a newer one has reset the trainer."""

    status = 409


class UnknownIncarnation(ProtocolError):
    """The trainer restarted since the driver last reset it: rows in memory are gone, replay from the last commit."""

    status = 409


class SequenceGap(ProtocolError):
    """A command arrived out of order; nothing was executed."""

    status = 409


class DigestMismatch(ProtocolError):
    """Bytes read are not the bytes recorded; they were not loaded."""

    status = 502


class Overloaded(ProtocolError):
    """No slot or queue place now: retry after `retry_after` seconds."""

    status = 429


class Unavailable(ProtocolError):
    """The role is up but what it needs is not (engine starting, store unreachable)."""

    status = 503


CODES: dict[str, type[ProtocolError]] = {
    c.__name__: c
    for c in (
        InvalidRequest,
        NotFound,
        NotExposed,
        StaleEpoch,
        UnknownIncarnation,
        SequenceGap,
        DigestMismatch,
        Overloaded,
        Unavailable,
    )
}


def raise_reply(reply: ErrorReply) -> None:
    """Raise the class that `reply.code` names; an unknown code becomes a plain ProtocolError."""
    raise CODES.get(reply.code, ProtocolError)(reply.message, retry_after=reply.retry_after)
