"""The one thread that touches the trainer: executes commands in the order they came, and micro-batches between them.

A forward_backward is not executed at once but becomes units in a queue of its run (`shares`). Each turn of the loop
first executes what has arrived, then one micro-batch for which all waiting runs are considered. So another run's
admission or step waits for one micro-batch and not for a whole pass, and small commands of many runs share one.

A run whose command is wrong is refused before it shares anything. What fails while runs share a micro-batch closes the
epoch of each of them, and their next passes are not shared: whose fault it is shows then, and only that one fails.

With several ranks, rank 0 is sent commands and every rank executes them. An error there that is no answer ends the
process: ranks that do not know how far the others came cannot go on. All are started again, as a new incarnation.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel

from allele.protocol import commands as c
from allele.protocol import samples
from allele.protocol.errors import Overloaded, ProtocolError, Unavailable, UnknownIncarnation
from allele_trainer.rl.packing import PAD
from allele_trainer.server.cost import CostModel
from allele_trainer.server.metrics import Metrics
from allele_trainer.server.parse import encoded, parsed
from allele_trainer.server.relay import Relay
from allele_trainer.server.session import Sessions
from allele_trainer.server.shares import Shares, Unit
from allele_trainer.server.trainer import Trainer
from allele_trainer.server.work import Part, Work

log = logging.getLogger(__name__)

MAX_WAITING = 256
"""Commands that are not answered; a driver sends one at a time, so this is about as many runs."""

Reply = concurrent.futures.Future[bytes]


@dataclasses.dataclass(frozen=True)
class Arrival:
    name: str
    body: bytes
    reply: Reply


@dataclasses.dataclass(eq=False)
class _Pass:
    """A forward_backward in its queue, and all who wait for its answer."""

    work: Work
    replies: list[Reply]
    seconds: float = 0.0
    """Its part of the time of micro-batches."""
    begun: bool = False
    """Gradients of it were added to."""
    left: int = 0
    """Units."""


class Executor:
    """`submit` from any thread; everything else runs on the thread that `start` makes."""

    def __init__(self, trainer: Trainer, *, sessions: Sessions, base_digest: str, metrics: Metrics) -> None:
        self._trainer, self._sessions, self._metrics = trainer, sessions, metrics
        self._base_digest = base_digest
        self._arrivals: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._shares: Shares[Part] = Shares(max_tokens=trainer.limits.max_tokens, max_members=trainer.limits.wave)
        self._relay = Relay(trainer.ranks)
        metrics.watch(trainer, runs=lambda: len(sessions.epochs))
        self._cost = CostModel(max_tokens=trainer.limits.max_tokens, padded_to=PAD)
        self._passes: dict[str, _Pass] = {}
        self._apart: set[str] = set()
        """Runs whose next pass is not shared, because one that they shared failed."""
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)
        self._commands: Mapping[str, tuple[type[BaseModel], Callable[..., BaseModel]]] = {
            "admit": (c.Admit, trainer.admit),
            "optim_step": (c.OptimStep, trainer.optim_step),
            "export": (c.Export, trainer.export),
            "save_state": (c.SaveState, trainer.save_state),
            "evict": (c.Evict, trainer.evict),
        }

    @property
    def names(self) -> Sequence[str]:
        """Commands that `submit` takes."""
        return ("reset", "forward_backward", *self._commands)

    def start(self) -> None:
        """Take commands, on rank 0."""
        self._thread.start()

    def follow(self) -> None:
        """Execute what rank 0 is sent until it ends, on any other rank."""
        while (commands := self._relay.commands(None)) is not None:
            self._turn([Arrival(name, body, Reply()) for name, body in commands])

    def stop(self) -> None:
        """End after the turn of the loop that is running; who still waits is told."""
        self._arrivals.put(None)
        self._thread.join()
        waiting = [reply for found in self._passes.values() for reply in found.replies]
        while not self._arrivals.empty():
            arrival = self._arrivals.get()
            waiting += [arrival.reply] if arrival is not None else []
        for reply in waiting:
            reply.set_exception(Unavailable("the trainer is ending", retry_after=5.0))

    def submit(self, name: str, body: bytes) -> Reply:
        """Raises Overloaded when too many wait."""
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} commands wait; retry", retry_after=1.0)
            self._waiting += 1
            self._metrics.waiting.set(self._waiting)
        reply: Reply = concurrent.futures.Future()
        reply.add_done_callback(self._answered)
        self._arrivals.put(Arrival(name, body, reply))
        return reply

    def _answered(self, _reply: Reply) -> None:
        with self._lock:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)

    def _run(self) -> None:
        try:
            self._lead()
        except BaseException:
            log.exception("the thread that executes commands ended; nothing would answer any more")
            os._exit(1)

    def _lead(self) -> None:
        while True:
            arrived = self._arrived()
            if None in arrived:
                self._relay.commands(None)
                return
            some = [a for a in arrived if a is not None]
            self._relay.commands([(a.name, a.body) for a in some])
            self._turn(some)

    def _turn(self, arrived: Sequence[Arrival]) -> None:
        for arrival in arrived:
            self._execute(arrival)
        if self._shares:
            self._micro_batch_of(self._shares.next())

    def _arrived(self) -> list[Arrival | None]:
        """What has come since; waits for something when there is nothing else to do."""
        found = [] if self._shares else [self._arrivals.get()]
        while True:
            try:
                found.append(self._arrivals.get_nowait())
            except queue.Empty:
                return found

    def _execute(self, arrival: Arrival) -> None:
        name, body, reply = arrival.name, arrival.body, arrival.reply
        began = time.perf_counter()
        try:
            if name == "reset":
                reply.set_result(self._reset(body))
            elif name == "forward_backward":
                self._begin_pass(body, reply)
            else:
                reply.set_result(self._command(name, body))
        except Exception as e:
            if not isinstance(e, ProtocolError):
                self._unexpected("command failed", {"command": name})
            reply.set_exception(e)
        if name != "forward_backward":
            self._metrics.seconds.labels(name).observe(time.perf_counter() - began)

    def _reset(self, body: bytes) -> bytes:
        command = parsed(c.Reset, body)
        self._sessions.check_epoch(command.run, command.epoch)
        self._trainer.reset(command)
        given_up = self._passes.pop(command.run, None)
        if given_up is not None:
            self._shares.remove(command.run)
            error = UnknownIncarnation(f"run {command.run}: reset while this command ran; replay from the last commit")
            for reply in given_up.replies:
                reply.set_exception(error)
        self._sessions.open(command.run, command.epoch)
        log.info("reset", extra={"run": command.run, "epoch": command.epoch, "members": len(command.members)})
        limits = self._trainer.limits
        return encoded(
            c.ResetDone(
                incarnation=self._sessions.incarnation,
                slots=limits.slots,
                wave=limits.wave,
                slots_reason=limits.reason,
                base_digest=self._base_digest,
                setting=self._trainer.setting,
            )
        )

    def _command(self, name: str, body: bytes) -> bytes:
        kind, execute = self._commands[name]
        command = parsed(kind, body)
        header: c.Header = command.header  # type: ignore[attr-defined]
        known = self._sessions.begin(header, _fingerprint(name, body))
        if known is not None:
            return known
        with self._sessions.executing(header):
            done = execute(command)
        if isinstance(done, c.OptimStepDone):
            self._metrics.skipped.inc(sum(m.skipped for m in done.members.values()))
        reply = encoded(done)
        self._sessions.done(header, reply)
        return reply

    def _begin_pass(self, body: bytes, reply: Reply) -> None:
        command, table = samples.decode(body, c.ForwardBackward, samples.TRAIN)
        header = command.header
        known = self._sessions.begin(header, _fingerprint("forward_backward", body))
        if known is not None:
            reply.set_result(known)
            return
        running = self._passes.get(header.run)
        if running is not None:  # the same command again, from a driver that lost its connection
            running.replies.append(reply)
            return
        with self._sessions.executing(header):
            work = self._trainer.begin(command, table)
        self._passes[header.run] = found = _Pass(work, [reply], left=len(work.units))
        sizes = [u.tokens for u in work.units]
        work.mode, curious = self._relay.choice(self._cost.choose(sizes), curious=self._cost.curious(sizes))
        units = work.units
        if curious:
            self._micro_batch_of([(header.run, units[0])])
            units = units[1:]
        if header.run in self._passes:
            self._shares.add(header.run, units, mode=work.mode, alone=header.run in self._apart)
            if not found.left:
                self._finish(header.run)

    def _micro_batch_of(self, picked: Sequence[tuple[str, Unit[Part]]]) -> None:
        runs = list(dict.fromkeys(run for run, _ in picked))
        began = time.perf_counter()
        try:
            self._trainer.train([u.work for _, u in picked])
        except ProtocolError as e:  # before anything was computed
            if len(runs) == 1:
                self._fail(runs[0], e)
            for run in runs if len(runs) > 1 else ():
                self._micro_batch_of([(r, u) for r, u in picked if r == run])
            return
        except Exception as e:
            self._unexpected("micro-batch failed", {"runs": runs})
            if len(runs) > 1:
                self._apart.update(runs)
            for run in runs:
                self._passes[run].begun = True
                self._fail(run, e)
            return
        seconds = time.perf_counter() - began
        total = sum(u.tokens for _, u in picked)
        self._cost.note(tokens=total, members=len(picked), seconds=seconds)
        for run, unit in picked:
            found = self._passes[run]
            found.begun, found.left = True, found.left - 1
            found.seconds += seconds * unit.tokens / total
        self._metrics.micro_batches.labels("shared" if len(runs) > 1 else "own").inc()
        for run in runs:
            if not self._passes[run].left:
                self._finish(run)

    def _unexpected(self, what: str, fields: Mapping[str, object]) -> None:
        """Log the exception being handled, and end the process if it has left the ranks apart."""
        log.exception(what, extra=fields)
        if not self._relay.alone:
            os._exit(1)

    def _finish(self, run: str) -> None:
        found = self._passes.pop(run)
        self._shares.remove(run)
        self._apart.discard(run)
        done = found.work.done()
        self._metrics.tokens.inc(sum(m.tokens for m in done.members.values()))
        self._metrics.seconds.labels("forward_backward").observe(found.seconds)
        reply = encoded(done)
        self._sessions.done(found.work.header, reply)
        for waiting in found.replies:
            waiting.set_result(reply)

    def _fail(self, run: str, error: Exception) -> None:
        """Refused, to be tried again, while none of its gradients were added; else the epoch is closed."""
        found = self._passes.pop(run)
        self._shares.remove(run)
        if found.begun or not isinstance(error, ProtocolError):
            self._sessions.broke(found.work.header, error)
            error = ProtocolError(f"forward_backward: {type(error).__name__}: {error}")
        else:
            self._sessions.refused(found.work.header)
        for waiting in found.replies:
            waiting.set_exception(error)


def _fingerprint(name: str, body: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + body).digest()
