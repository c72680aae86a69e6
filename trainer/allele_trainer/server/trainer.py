"""Executes commands: runs and their members over the banks of one frozen model. One thread calls it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import pyarrow as pa

from allele.format import AdapterShape, ShapeMismatch, StateShape
from allele.protocol import commands as c
from allele.protocol.errors import InvalidRequest, NotFound
from allele_trainer.bank.rows import Bank, Update
from allele_trainer.bank.start import Starts, from_bytes
from allele_trainer.bank.table import Key, Page, PageTable
from allele_trainer.model.build import BaseModel
from allele_trainer.rl.packing import Sample
from allele_trainer.rl.passes import logprobs, train
from allele_trainer.rl.samples import read_samples
from allele_trainer.server.store import RunStore

PROBE_ROWS = 16
"""Scratch rows of a bank, never more than its slots: members probed in one forward. Each costs P·4 bytes."""


@dataclasses.dataclass(frozen=True)
class Limits:
    slots: int
    max_rank: int
    max_tokens: int


@dataclasses.dataclass
class Run:
    store: RunStore
    tables: dict[str, PageTable]
    """Member → the table of its shape."""
    admitted: set[str] = dataclasses.field(default_factory=set)


class Trainer:
    def __init__(self, model: BaseModel, *, open_store: Callable[[str, str], RunStore], limits: Limits) -> None:
        self.model, self.limits = model, limits
        self._open_store = open_store
        self._tables: dict[str, PageTable] = {}
        self._runs: dict[str, Run] = {}

    @property
    def used(self) -> int:
        return sum(t.used for t in self._tables.values())

    def reset(self, command: c.Reset) -> None:
        """Forget the run's rows and note where its members start; rows are read when first needed."""
        shapes = [self._shape(m) for m in command.members]
        names = [m.member for m in command.members]
        if len(set(names)) != len(names):
            raise InvalidRequest(f"members: expected each name once, found {len(names) - len(set(names))} repeated")
        store = self._open_store(command.namespace, command.population)
        self.drop(command.run)
        run = self._runs[command.run] = Run(store, {})
        starts: dict[str, Starts] = {}
        for start, shape in zip(command.members, shapes, strict=True):
            table = run.tables[start.member] = self._table(shape)
            source = starts.setdefault(shape.digest, Starts(store, shape))
            source.add(start)
            page = Page(scale=start.adapter.scale, optimizer=start.optimizer, start=source.rows)
            table.add(Key(command.run, start.member), page)

    def drop(self, run: str) -> None:
        self._runs.pop(run, None)
        for table in self._tables.values():
            table.drop_run(run)

    def admit(self, command: c.Admit) -> c.Admitted:
        name, run = command.header.run, self._run(command.header)
        slots: dict[str, int] = {}
        groups = self._by_table(run, command.header, command.members)
        for table in self._tables.values():
            keys = groups.get(id(table), [])
            table.evict_others(name, keys)
            slots.update(zip((k.member for k in keys), table.resident(keys), strict=True))
        run.admitted = set(command.members)
        return c.Admitted(slots={m: slots[m] for m in command.members})

    def forward_backward(self, command: c.ForwardBackward, batch: pa.Table) -> c.ForwardBackwardDone:
        began, run = time.perf_counter(), self._run(command.header)
        config = self.model.config
        samples = read_samples(batch, members=run.admitted, vocab=config.vocab, context=config.context)
        members: dict[str, c.MemberLoss] = {}
        for keys in self._by_table(run, command.header, dict.fromkeys(s.member for s in samples)).values():
            table = run.tables[keys[0].member]
            slot_of = dict(zip((k.member for k in keys), table.resident(keys), strict=True))
            for key in keys:
                table.page(key).pending = True
            mine = [
                Sample(slot_of[s.member], s.prompt, s.completion, s.logprobs, s.advantage)
                for s in samples
                if s.member in slot_of
            ]
            losses = train(self.model, table.bank, mine, loss=command.loss, max_tokens=self.limits.max_tokens)
            members.update({m: losses[slot] for m, slot in slot_of.items()})
        return c.ForwardBackwardDone(members=members, seconds=time.perf_counter() - began)

    def optim_step(self, command: c.OptimStep) -> c.OptimStepDone:
        run, rates = self._run(command.header), command.learning_rates
        groups = self._by_table(run, command.header, rates)
        wrong = {m: rate for m, rate in rates.items() if not (math.isfinite(rate) and rate >= 0)}
        if wrong:
            raise InvalidRequest(f"learning_rates: expected finite numbers of at least 0, found {wrong}")
        idle = [k.member for keys in groups.values() for k in keys if not run.tables[k.member].page(k).pending]
        if idle:
            raise InvalidRequest(
                f"learning_rates: expected members with a gradient since their last step, found {idle}"
            )
        members: dict[str, c.MemberUpdate] = {}
        for keys in groups.values():
            table = run.tables[keys[0].member]
            for wave in _waves(keys, self.limits.slots):
                slots = table.resident(wave)
                updates = [
                    Update(s, rates[k.member], table.page(k).optimizer) for s, k in zip(slots, wave, strict=True)
                ]
                for key, done in zip(wave, table.bank.step(updates), strict=True):
                    table.page(key).pending = False
                    members[key.member] = c.MemberUpdate(step=done.step, grad_norm=done.norm, skipped=done.skipped)
        return c.OptimStepDone(members=members)

    def export(self, command: c.Export) -> c.ExportDone:
        run = self._run(command.header)
        packed: dict[str, bytes] = {}
        for keys in self._by_table(run, command.header, command.members).values():
            table = run.tables[keys[0].member]
            table.materialise(keys)
            packed.update({k.member: table.bank.shape.pack(table.weights(k).numpy()) for k in keys})
        probes = self._probe(run, command, packed) if command.probes else {}
        weights = run.store.write_segment(packed, kind="segments") if packed else {}
        digests = {m: run.tables[m].bank.shape.digest for m in packed}
        return c.ExportDone(weights=weights, shape_digests=digests, probe_logprobs=probes)

    def _probe(self, run: Run, command: c.Export, packed: Mapping[str, bytes]) -> dict[str, tuple[float, ...]]:
        """Logprobs of the probe completions under the packed bytes, read back as a reader of the segment would."""
        self._check_probes(command.probes)
        result: dict[str, tuple[float, ...]] = {}
        for keys in self._by_table(run, command.header, command.members).values():
            table = run.tables[keys[0].member]
            bank = table.bank
            for wave in _waves(keys, bank.probes):
                slots = [
                    bank.store_probe(i, from_bytes(bank.shape.unpack(packed[k.member])), scale=table.page(k).scale)
                    for i, k in enumerate(wave)
                ]
                samples = [Sample(slot, p.prompt, p.completion) for slot in slots for p in command.probes]
                values = logprobs(self.model, bank, samples, max_tokens=self.limits.max_tokens)
                result.update({k.member: tuple(values[s]) for k, s in zip(wave, slots, strict=True)})
        return result

    def save_state(self, command: c.SaveState) -> c.SaveStateDone:
        run = self._run(command.header)
        packed: dict[str, bytes] = {}
        for keys in self._by_table(run, command.header, command.members).values():
            table = run.tables[keys[0].member]
            state = StateShape(table.bank.shape)
            table.materialise(keys)
            for key in keys:
                row = table.row(key)
                packed[key.member] = state.pack(
                    weights=row.weights.numpy(),
                    exp_avg=row.exp_avg.numpy(),
                    exp_avg_sq=row.exp_avg_sq.numpy(),
                    step=row.step,
                )
        return c.SaveStateDone(states=run.store.write_segment(packed, kind="states") if packed else {})

    def evict(self, command: c.Evict) -> c.Evicted:
        run = self._run(command.header)
        for keys in self._by_table(run, command.header, command.members).values():
            run.tables[keys[0].member].evict(keys)
        run.admitted -= set(command.members)
        return c.Evicted(members=command.members)

    def _run(self, header: c.Header) -> Run:
        return self._runs[header.run]

    def _by_table(self, run: Run, header: c.Header, members: Iterable[str]) -> dict[int, list[Key]]:
        """Keys by the table of their shape. Raises NotFound for a member that the reset did not name."""
        groups: dict[int, list[Key]] = {}
        for member in dict.fromkeys(members):
            if member not in run.tables:
                raise NotFound(f"member {member}: not in the reset of run {header.run}")
            groups.setdefault(id(run.tables[member]), []).append(Key(header.run, member))
        return groups

    def _shape(self, start: c.MemberStart) -> AdapterShape:
        adapter = start.adapter
        if adapter.rank > self.limits.max_rank:
            raise InvalidRequest(
                f"member {start.member}, rank: expected at most {self.limits.max_rank} (--max-rank), "
                f"found {adapter.rank}"
            )
        if start.optimizer.clip <= 0:
            raise InvalidRequest(f"member {start.member}, clip: expected a positive norm, found {start.optimizer.clip}")
        try:
            return AdapterShape.from_model(self.model.config.raw, rank=adapter.rank, targets=adapter.targets)
        except ShapeMismatch as e:
            raise InvalidRequest(f"member {start.member}: {e}") from e

    def _table(self, shape: AdapterShape) -> PageTable:
        """The bank of a shape, made when its first member appears."""
        if shape.digest not in self._tables:
            slots = self.limits.slots
            bank = Bank(shape, slots=slots, probes=min(slots, PROBE_ROWS), device=self.model.device)
            self._tables[shape.digest] = PageTable(bank)
        return self._tables[shape.digest]

    def _check_probes(self, probes: Sequence[c.ProbeSequence]) -> None:
        for i, probe in enumerate(probes):
            ids = (*probe.prompt, *probe.completion)
            if not probe.prompt or not probe.completion or min(ids) < 0 or max(ids) >= self.model.config.vocab:
                raise InvalidRequest(
                    f"probes[{i}]: expected a prompt and a completion of ids in 0..{self.model.config.vocab - 1}"
                )


def _waves(keys: Sequence[Key], size: int) -> list[Sequence[Key]]:
    return [keys[i : i + size] for i in range(0, len(keys), size)]
