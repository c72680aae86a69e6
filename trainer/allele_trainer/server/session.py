"""Order and idempotence of a run's commands: each is executed once, a repeated one gets the same answer.

Nothing in memory outlives doubt: a command that failed half-way closes the epoch, and the driver must reset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from allele.protocol.commands import Header
from allele.protocol.errors import InvalidRequest, ProtocolError, SequenceGap, StaleEpoch, UnknownIncarnation


@dataclasses.dataclass
class Session:
    """What the trainer remembers of a run's conversation; `fingerprint` tells a repeat from another command."""

    epoch: int
    seq: int = 0
    fingerprint: bytes = b""
    reply: bytes = b""
    broken: str = ""


class Sessions:
    """Sessions by run, within one incarnation of the trainer."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self._sessions: dict[str, Session] = {}

    @property
    def epochs(self) -> dict[str, int]:
        return {run: session.epoch for run, session in self._sessions.items()}

    def check_epoch(self, run: str, epoch: int) -> None:
        """Raises StaleEpoch when a newer driver has already reset the run."""
        session = self._sessions.get(run)
        if session is not None and epoch < session.epoch:
            raise StaleEpoch(
                f"run {run}: expected epoch {session.epoch} or later, found {epoch}; a newer driver owns the run"
            )

    def open(self, run: str, epoch: int) -> None:
        """Start the conversation of an epoch at seq 0."""
        self.check_epoch(run, epoch)
        self._sessions[run] = Session(epoch)

    def close(self, run: str) -> None:
        self._sessions.pop(run, None)

    def execute(self, header: Header, fingerprint: bytes, work: Callable[[], bytes]) -> bytes:
        """The command's answer: from `work` the first time, remembered the second.

        A ProtocolError of `work` means that nothing was changed: the seq may be tried again. Any other exception closes
        the epoch.
        """
        session = self._checked(header)
        if header.seq == session.seq:
            if fingerprint != session.fingerprint:
                raise InvalidRequest(
                    f"seq: {header.seq} of run {header.run} was another command; expected {session.seq + 1}"
                )
            return session.reply
        if header.seq != session.seq + 1:
            raise SequenceGap(
                f"run {header.run}: expected seq {session.seq + 1}, found {header.seq}; nothing was executed"
            )
        try:
            reply = work()
        except ProtocolError:
            raise
        except Exception as e:
            session.broken = f"{type(e).__name__}: {e}"
            raise
        session.seq, session.fingerprint, session.reply = header.seq, fingerprint, reply
        return reply

    def _checked(self, header: Header) -> Session:
        if header.incarnation != self.incarnation:
            raise UnknownIncarnation(
                f"incarnation: expected {self.incarnation}, found {header.incarnation}; "
                "reset the run and replay from the last commit"
            )
        session = self._sessions.get(header.run)
        if session is None:
            raise UnknownIncarnation(
                f"run {header.run}: not known to this incarnation; reset it and replay from the last commit"
            )
        self.check_epoch(header.run, header.epoch)
        if header.epoch > session.epoch:
            raise SequenceGap(f"run {header.run}: epoch {header.epoch} was not opened; expected a reset first")
        if session.broken:
            raise UnknownIncarnation(
                f"run {header.run}: a command failed half-way ({session.broken}); reset and replay"
            )
        return session
