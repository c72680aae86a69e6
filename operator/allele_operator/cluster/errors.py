"""What can go wrong at the API server, as types that the queue and the reconciler can tell apart."""

from __future__ import annotations


class ApiError(Exception):
    """An answer outside 2xx, or none at all (status 0: connection, timeout, TLS)."""

    def __init__(self, status: int, reason: str, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(_shortened(f"{status or 'no answer'} {reason}: {message}"))
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        """Seconds that the server asked to wait, 0 if it did not."""

    @property
    def not_found(self) -> bool:
        return self.status == 404

    @property
    def already_exists(self) -> bool:
        return self.status == 409 and self.reason == "AlreadyExists"

    @property
    def conflict(self) -> bool:
        """The object changed, or is another one of that name: read it again and decide anew."""
        return self.status == 409 and self.reason != "AlreadyExists"

    @property
    def terminating(self) -> bool:
        """Creation refused because the namespace is being deleted: nothing will ever fit in there again."""
        return self.status == 403 and "being terminated" in self.message


def _shortened(text: str) -> str:
    """A refusal may repeat the whole object in its middle; what is wrong with it comes last."""
    return text if len(text) <= 600 else f"{text[:250]} … {text[-347:]}"


class FenceShut(Exception):
    """A write was asked for while this process may no longer be the leader. The process must end."""
