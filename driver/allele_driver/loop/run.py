"""A run from its start to its end, across restarts of everything around it.

Step 0 gives every new member its first revision; steps 1 to stop.steps train; one more commit exposes what the last
step made and carries the held-out rewards.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping

from allele.protocol.errors import ProtocolError, SequenceGap, UnknownIncarnation
from allele.protocol.progress import TrainerSlots
from allele.protocol.serving import Target
from allele.store import Fact
from allele_driver.failures import Failures
from allele_driver.loop import heldout, record
from allele_driver.loop.announcer import Announcer
from allele_driver.loop.exposer import Exposer
from allele_driver.loop.ledger import Ledger
from allele_driver.loop.recorder import Recorder
from allele_driver.loop.resume import optimizer_spec, start_point, unexposed
from allele_driver.loop.rollout import ActivePart, Roller
from allele_driver.loop.roster import Roster
from allele_driver.loop.stages import Stages
from allele_driver.loop.train import initialise, train
from allele_driver.loop.voice import Voice
from allele_driver.members import InvalidInput, Member
from allele_driver.metrics import RECOVERIES
from allele_driver.rollouts import Rollouts
from allele_driver.trainer import Trainer

log = logging.getLogger(__name__)

RELEASE_SECONDS = 15
"""How long the end of a run waits for the trainer to take its rows back."""

RECOVERY_LIMIT = 5
"""Recoveries without a commit between them, after which the driver gives up and is restarted."""


class RunFailed(Exception):
    """The run cannot go on."""


@dataclasses.dataclass(frozen=True)
class Equipment:
    """What a run works with."""

    trainer: Trainer
    roller: Roller
    ledger: Ledger
    exposer: Exposer
    announcer: Announcer
    origin: record.Origin
    voice: Voice
    stopping: asyncio.Event


class Run:
    """One run; `run` is called once."""

    def __init__(self, equipment: Equipment, active: tuple[ActivePart, ...]) -> None:
        self._with = equipment
        self._bundle = equipment.origin.bundle
        self._spec = self._bundle.run_spec
        self._index = equipment.ledger.index
        self._roster = Roster(active, self._spec)
        self._recorder = Recorder(equipment.origin, equipment.ledger, self._roster)
        self._voice = equipment.voice
        self._current: dict[str, int] = {}
        """Member → the revision that the trainer's row is."""
        self._newcomers: list[Member] = []
        self._abandoned: list[Fact] = []
        self._ahead: asyncio.Task[Rollouts] | None = None
        self._wave = 1
        """Members that the trainer takes at a time, as it says when it is reset."""
        self._failures = Failures()
        self._recoveries = 0
        self._reached = False
        self._after_commit: dict[str, float] = {}
        """Seconds of the last step's stages that came after its provenance was written."""
        last = equipment.ledger.last_step
        self._step = -1 if last is None else last
        self._voice.tally.step = max(0, self._step)
        self._voice.tally.epoch = equipment.ledger.fence
        self._voice.tally.members = len(self._roster.members)

    async def run(self) -> bool:
        """Whether the run came to its end; False: it was told to stop, and can be gone on with."""
        ended = await self._until_end()
        await self._release()
        return ended

    async def _until_end(self) -> bool:
        steps = self._spec.stop.steps
        if self._step > steps:
            self._voice.phase("Succeeded")
            return True
        try:
            self._voice.phase("Starting")
            await self._restore()
            self._probe_waiting()
            while self._step < steps and not self._reached:
                if self._with.stopping.is_set():
                    return False
                await self._advance()
            await self._finish()
            return True
        finally:
            await self._cancel_ahead()
            await self._with.announcer.cancel()
            await self._with.exposer.cancel()

    async def _release(self) -> None:
        """Give slots and memory of a long-lived trainer back. Nothing depends on it, so a trainer away is let be."""
        bundle = self._bundle
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                await self._with.trainer.reset(
                    epoch=self._with.ledger.fence,
                    namespace=bundle.namespace,
                    population=bundle.population,
                    members=(),
                )
        except (TimeoutError, ProtocolError) as e:
            log.warning("the trainer keeps this run's rows: %s: %s", type(e).__name__, e)

    async def _advance(self) -> None:
        """One step, or a recovery after which the same step is done again from its samples on."""
        try:
            await (self._initial() if self._step < 0 else self._train_step(self._step + 1))
            self._recoveries = 0
        except ProtocolError as e:
            # A plain ProtocolError: a command failed half-way, and the trainer has closed the epoch.
            if type(e) not in (ProtocolError, UnknownIncarnation, SequenceGap):
                raise
            await self._recover(e)

    async def _recover(self, error: ProtocolError) -> None:
        self._recoveries += 1
        RECOVERIES.labels(type(error).__name__).inc()
        log.warning("recovering from the last commit: %s: %s", type(error).__name__, error, extra={"step": self._step})
        if self._recoveries > RECOVERY_LIMIT:
            raise RunFailed(f"{RECOVERY_LIMIT} recoveries without a commit; the last after {error}") from error
        await self._cancel_ahead()
        await asyncio.sleep(0.5 * (self._recoveries - 1))
        await self._restore()

    async def _restore(self) -> None:
        """Bring the trainer to the last commit with state."""
        bundle = self._bundle
        points = [
            start_point(m, self._index, run=bundle.run_uid, start_from=self._spec.start_from)
            for m in self._roster.members
        ]
        done = await self._with.trainer.reset(
            epoch=self._with.ledger.fence,
            namespace=bundle.namespace,
            population=bundle.population,
            members=[p.command(optimizer_spec(self._roster.recipe(p.member.name).optimizer)) for p in points],
        )
        if done.base_digest != bundle.population_spec.base.digest:
            raise InvalidInput(
                f"base: expected digest {bundle.population_spec.base.digest} in the trainer, found {done.base_digest}"
            )
        self._wave, self._recorder.setting = done.wave, done.setting
        self._voice.tally.trainer = TrainerSlots(slots=done.slots, wave=done.wave, reason=done.slots_reason)
        self._current = {p.member.name: p.revision for p in points if p.revision is not None}
        self._newcomers = [p.member for p in points if p.revision is None]
        self._abandoned = [
            Fact(kind="Abandoned", member=p.member.name, revision=r, reason="its optimizer state was not saved")
            for p in points
            for r in p.abandoned
        ]
        counts = {"resumed": len(self._current), "new": len(self._newcomers), "abandoned": len(self._abandoned)}
        log.info("trainer reset", extra={"step": self._step, "incarnation": done.incarnation, **counts})

    async def _initial(self) -> None:
        """Step 0: held-out rewards before training, and a first revision for every member without one."""
        before = await self._evaluate()
        first = await self._first_revisions(before)
        told = {f.member for f in first}
        again = heldout.restated(before, but=told, current=self._current, index=self._index)
        version = await self._commit(0, [*first, *self._abandoned, *again])
        self._announce(1, version=version, seconds=0.0)
        log.info(
            "first revisions committed", extra={"step": 0, "members": len(first), heldout.HELDOUT: heldout.mean(before)}
        )

    async def _first_revisions(self, rewards: Mapping[str, float]) -> list[Fact]:
        facts: list[Fact] = []
        for i, active in enumerate(self._roster.active):
            new = self._roster.share(i, self._newcomers)
            if new:
                exported = await initialise(
                    self._with.trainer,
                    [m.name for m in new],
                    wave=self._wave,
                    probes=active.probes,
                    stages=Stages(),
                )
                facts += await self._recorder.first(i, new, exported, step=self._step + 1, rewards=rewards)
        return facts

    async def _train_step(self, step: int) -> None:
        stages, began = Stages(), time.monotonic()
        rollouts = await self._rollouts(step, stages)
        if self._spec.pace.max_policy_lag > 0 and step < self._spec.stop.steps:
            self._ahead = asyncio.create_task(self._roll_out(step + 1, Stages()))
        mean, wanted = heldout.mean(rollouts.mean_rewards()), self._spec.stop.reward
        self._reached = mean is not None and wanted is not None and mean >= wanted
        turns = self._roster.turns(step, rollouts, done=self._own_steps(rollouts.members))
        trained = await train(
            self._with.trainer,
            turns,
            wave=self._wave,
            probes={i: a.probes for i, a in enumerate(self._roster.active)},
            ending=lambda: self._reached or self._with.stopping.is_set(),
            stages=stages,
        )
        lags = record.lags(rollouts, self._current, self._index)
        seconds = self._after_commit | stages.seconds
        made = await self._recorder.step(
            step, turns, trained, rollouts, current=self._current, lags=lags, seconds=seconds
        )
        first = await self._first_revisions({})
        with stages("expose"):
            exposed = await self._exposed()
        with stages("commit"):
            version = await self._commit(step, [*made, *first, *self._abandoned, *exposed])
        ahead = 1 if self._spec.pace.max_policy_lag > 0 else 0  # the next step is being sampled already
        self._announce(step + 1 + ahead, version=version, seconds=time.monotonic() - began)
        self._after_commit = {s: stages.seconds[s] for s in ("expose", "commit")}
        self._probe([Target(member=f.member, revision=f.revision or 0) for f in made], version=version)
        self._voice.tally.policy_lag = max((lag for found in lags.values() for lag in found), default=0)
        self._voice.step(
            step,
            rollouts,
            trained,
            stages=stages,
            seconds=time.monotonic() - began,
        )

    async def _rollouts(self, step: int, stages: Stages) -> Rollouts:
        ahead, self._ahead = self._ahead, None
        with stages("rollout"):
            rollouts = await (ahead or self._roll_out(step, stages))
        for name, wanted in rollouts.wanted.items():
            self._failures.note(name, dropped=rollouts.dropped.get(name, {}), samples=wanted)
        return rollouts

    async def _roll_out(self, step: int, stages: Stages) -> Rollouts:
        stopped = self._failures.stopped
        if len(stopped) == len(self._roster.members):
            raise RunFailed(
                f"all {len(stopped)} members stopped, the first, {next(iter(stopped))}: {next(iter(stopped.values()))}"
            )

        return await self._roster.to_train_on(
            self._with.roller,
            self._roster.cohort(step, ready=self._current.keys() - stopped.keys()),
            step=step,
            revisions=dict(self._current),
            version=self._index.version,
            stages=stages,
        )

    def _own_steps(self, members: Iterable[str]) -> dict[str, int]:
        """Steps of this run that the revision in the trainer has had, from the facts, so also after a restart."""
        found = {}
        for m in members:
            fact = self._index.get(m, self._current[m])
            if fact is not None and fact.run == self._bundle.run_uid:
                found[m] = int(fact.metrics.get(record.OWN_STEP, 0))
        return found

    async def _commit(self, step: int, facts: list[Fact]) -> int:
        version = await self._with.ledger.commit(step, facts)
        self._current |= {f.member: f.revision for f in facts if f.kind == "Committed" and f.revision is not None}
        self._newcomers, self._abandoned = [], []
        self._step = step
        self._voice.tally.step = step
        run = self._bundle.run_uid
        self._voice.tally.count(dataclasses.replace(f, run=run, step=step) for f in facts)
        return version

    async def _exposed(self) -> list[Fact]:
        """What the probes of the step before let be served; members that they refuse too often stop."""
        exposer = self._with.exposer
        exposed = await exposer.finish(self._index, abandoned=self._abandoned)
        for verdict in exposer.verdicts:
            self._failures.probed(verdict, gate=exposer.gate)
        self._voice.exposure(exposer, failed=self._failures.stopped)
        return exposed

    def _announce(self, step: int, *, version: int, seconds: float) -> None:
        """Have gateways load what `step` will sample; `seconds`: that a step takes."""
        if step <= self._spec.stop.steps:
            members = self._roster.sampled(step, ready=self._current.keys() - self._failures.stopped.keys())
            targets = [Target(member=m.name, revision=self._current[m.name]) for m in members]
            if targets:
                self._with.announcer.announce(targets, version=version, step_seconds=seconds)

    def _probe_waiting(self) -> None:
        """Probe what an earlier driver committed and did not live to expose."""
        waiting = [(m, r) for m, r in self._current.items() if unexposed(m, r, self._index)]
        self._probe([Target(member=m, revision=r) for m, r in waiting], version=self._index.version)

    def _probe(self, targets: list[Target], *, version: int) -> None:
        self._with.exposer.begin(targets, version=version, stages=Stages())

    async def _finish(self) -> None:
        """Held-out rewards after training, and the exposures of the last step, in a commit of their own."""
        self._voice.phase("Finishing")
        await self._cancel_ahead()
        exposed = await self._exposed()
        after = await self._evaluate()
        told = [dataclasses.replace(f, metrics={**f.metrics, **heldout.metrics_of(f.member, after)}) for f in exposed]
        again = heldout.restated(after, but={f.member for f in told}, current=self._current, index=self._index)
        await self._commit(self._spec.stop.steps + 1, [*told, *self._abandoned, *again])
        before = heldout.before(self._roster, self._index, run=self._bundle.run_uid)
        found = heldout.summary(before, after)
        progress = self._voice.tally.progress().model_dump(mode="json")
        log.info("summary", extra={heldout.HELDOUT: found, "progress": progress})
        said = f"held-out reward {heldout.mean(before):.3f} → {heldout.mean(after):.3f}" if before and after else ""
        self._voice.phase("Succeeded", said)

    async def _evaluate(self) -> dict[str, float]:
        return await heldout.evaluate(
            self._roster,
            self._with.roller,
            prompts=self._spec.evaluation.prompts,
            current=dict(self._current),
            skip=self._failures.stopped,
            version=self._index.version,
        )

    async def _cancel_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)
