"""Order and idempotence of a run's commands: each is executed once, a repeated one gets the same answer.

Nothing in memory outlives doubt: a command that failed half-way closes the epoch, and the driver must reset.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from allele.protocol.commands import Header
from allele.protocol.errors import InvalidRequest, ProtocolError, SequenceGap, StaleEpoch, UnknownIncarnation


@dataclasses.dataclass
class Session:
    """What the trainer remembers of a run's conversation; a fingerprint tells a repeat from another command."""

    epoch: int
    seq: int = 0
    fingerprint: bytes = b""
    reply: bytes = b""
    running: bytes = b""
    """Fingerprint of the command that is being executed, under seq + 1."""
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

    def begin(self, header: Header, fingerprint: bytes) -> bytes | None:
        """The answer of a command that was executed before; None for the next one, which is running from now on, and
        for a repeat of one that runs."""
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
        if session.running and session.running != fingerprint:
            raise InvalidRequest(f"seq: {header.seq} of run {header.run} is another command, which is running")
        session.running = fingerprint
        return None

    def done(self, header: Header, reply: bytes) -> None:
        """The running command was executed."""
        session = self._sessions[header.run]
        session.seq, session.fingerprint, session.reply, session.running = header.seq, session.running, reply, b""

    @contextlib.contextmanager
    def executing(self, header: Header) -> Iterator[None]:
        """What the running command raises inside is noted: a ProtocolError means that nothing was changed."""
        try:
            yield
        except ProtocolError:
            self.refused(header)
            raise
        except Exception as e:
            self.broke(header, e)
            raise

    def refused(self, header: Header) -> None:
        """The running command changed nothing: its seq may be tried again."""
        self._sessions[header.run].running = b""

    def broke(self, header: Header, error: Exception) -> None:
        """The running command failed half-way: the epoch is closed."""
        session = self._sessions[header.run]
        session.running, session.broken = b"", f"{type(error).__name__}: {error}"

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
