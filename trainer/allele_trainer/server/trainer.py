"""Executes commands: runs and their members over the banks of one frozen model. One thread calls it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import torch

from allele.format import AdapterShape, ShapeMismatch, StateShape
from allele.protocol import commands as c
from allele.protocol.errors import InvalidRequest, NotFound
from allele.protocol.initialisation import InitSpec
from allele_trainer.bank.banks import Banks
from allele_trainer.bank.host import Held, HostTier
from allele_trainer.bank.rows import Bank
from allele_trainer.bank.shard import Shard
from allele_trainer.bank.start import Starts, from_bytes
from allele_trainer.bank.step import Update, step
from allele_trainer.bank.table import Key, Page, PageTable
from allele_trainer.initialisation import rows
from allele_trainer.initialisation.initialiser import First, Initialiser
from allele_trainer.model.build import BaseModel
from allele_trainer.rl.packing import Sample
from allele_trainer.rl.passes import logprobs, train
from allele_trainer.rl.samples import read_samples
from allele_trainer.server import segments
from allele_trainer.server.recent import Recent
from allele_trainer.server.store import RunStore
from allele_trainer.server.work import Part, Work, work_of

PROBE_ROWS = 16
"""Scratch rows of a bank, never more than its slots: members probed in one forward. Each costs P·4 bytes."""


class NothingLearned(Exception):
    """A member did not move although its gradient and its rate say that it should have."""


@dataclasses.dataclass(frozen=True)
class Limits:
    slots: int
    """Of each adapter shape."""
    wave: int
    """Members of one shape with a gradient at a time, never more than `slots`."""
    max_rank: int
    max_tokens: int
    host_memory: int
    """Bytes of rows that are in no slot."""
    reason: str = "given"
    """Where `slots` and `wave` come from."""


@dataclasses.dataclass
class Run:
    store: RunStore
    tables: dict[str, PageTable]
    """Member → the table of its shape."""
    firsts: dict[c.AdapterSpec, First] = dataclasses.field(default_factory=dict)
    """What members start from, where that depends on the base; gone with the run, as a row has an adapter's size."""
    factors: dict[str, str] = dataclasses.field(default_factory=dict)
    """Member → digest of the factors of the base in it."""
    admitted: set[str] = dataclasses.field(default_factory=set)


class Trainer:
    def __init__(
        self,
        model: BaseModel,
        *,
        open_store: Callable[[str, str], RunStore],
        limits: Limits,
        initialiser: Initialiser | None = None,
        recent: Recent | None = None,
        image: str = "",
    ) -> None:
        """`initialiser`: of the base; without one members can only be of kind Standard. `recent`: takes exports."""
        self.model, self.ranks, self.limits = model, model.ranks, limits
        self.setting = c.TrainerSetting(
            layout={axis: int(degree) for axis, degree in dataclasses.asdict(model.ranks.layout).items()},
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            torch=torch.__version__,
            megatron_core=version("megatron-core"),
            image=image,
        )
        self._initialiser = initialiser
        self.recent = recent or Recent(0)
        self._open_store = open_store
        self.host = HostTier(capacity=limits.host_memory, pinned=model.device.type == "cuda", spill=self._spill)
        self._shapes: dict[tuple[int, tuple[str, ...]], AdapterShape] = {}
        self._tables: dict[str, PageTable] = {}
        self._masks: dict[tuple[str, InitSpec], torch.Tensor | None] = {}
        self._runs: dict[str, Run] = {}

    @property
    def used(self) -> int:
        return sum(t.used for t in list(self._tables.values()))

    @property
    def bank_bytes(self) -> int:
        """Device memory of all rows."""
        return sum(t.bank.nbytes for t in list(self._tables.values()))

    def moved(self) -> dict[str, int]:
        """Rows so far, by what happened to them."""
        tables = list(self._tables.values())
        return {
            "loaded": sum(t.loaded for t in tables),
            "written_back": sum(t.written_back for t in tables),
            "left_clean": sum(t.clean for t in tables),
            "dropped": self.host.dropped,
            "spilled": self.host.spilled,
        }

    def reset(self, command: c.Reset) -> None:
        """Forget the run's rows and note where its members start; rows are read when first needed."""
        shapes = [self._shape(m) for m in command.members]
        names = [m.member for m in command.members]
        if len(set(names)) != len(names):
            raise InvalidRequest(f"members: expected each name once, found {len(names) - len(set(names))} repeated")
        store = self._open_store(command.namespace, command.population)
        firsts = self._firsts(dict.fromkeys(m.adapter for m in command.members))
        self.drop(command.run)
        run = self._runs[command.run] = Run(store, {}, firsts=firsts)
        starts: dict[str, Starts] = {}
        rules: dict[c.OptimizerSpec, c.OptimizerSpec] = {}
        for start, shape in zip(command.members, shapes, strict=True):
            table = run.tables[start.member] = self._table(shape)
            source = starts.setdefault(shape.digest, Starts(store, shape, lambda s: _row(firsts.get(s.adapter))))
            source.add(start)
            if first := firsts.get(start.adapter):
                run.factors[start.member] = first.digest
            page = Page(
                scale=start.adapter.scale,
                optimizer=rules.setdefault(start.optimizer, start.optimizer),
                start=source,
                trained=self._trained(table, start.adapter.init),
            )
            table.add(Key(command.run, start.member), page)

    def drop(self, run: str) -> None:
        self._runs.pop(run, None)
        for table in self._tables.values():
            table.drop_run(run)

    def admit(self, command: c.Admit) -> c.Admitted:
        run = self._run(command.header)
        slots: dict[str, int] = {}
        groups = self._by_table(run, command.header, command.members)
        for table in self._tables.values():
            keys = groups.get(id(table), [])
            slots.update(zip((k.member for k in keys), table.resident(keys), strict=True))
        run.admitted = set(command.members)
        for keys in self._by_table(run, command.header, command.next).values():
            table = run.tables[keys[0].member]
            table.prefetch(keys, keep={Key(command.header.run, m) for m in command.members})
        return c.Admitted(slots={m: slots[m] for m in command.members})

    def begin(self, command: c.ForwardBackward, batch: pa.Table) -> Work:
        """Validate a forward_backward and cut it into units for `train`; nothing is computed yet."""
        run = self._run(command.header)
        samples = read_samples(batch, losses=command.losses, members=run.admitted, config=self.model.config)
        work = work_of(command, samples, run.tables, max_tokens=self.limits.max_tokens)
        for member in work.sums:
            run.tables[member].page(Key(command.header.run, member)).pending = True
        return work

    def train(self, parts: Sequence[Part]) -> None:
        """One micro-batch, of any runs: add gradients to its members' rows and sums to their work.

        Raises what the store raises, or Overloaded, before anything is computed.
        """
        by_table: dict[int, list[Part]] = {}
        for part in parts:
            by_table.setdefault(id(part.table), []).append(part)
        tables = [t for t in self._tables.values() if id(t) in by_table]
        banks, owned = Banks(t.bank for t in tables), []
        for place, table in enumerate(tables):  # what may fail comes before what cannot be undone
            some = by_table[id(table)]
            slots = table.resident([p.key for p in some], gradients=True)
            owned += [(banks.owner(place, slot), p) for slot, p in zip(slots, some, strict=True)]
        self._learn([p for p in parts if p.key.member not in p.work.goals])
        owned.sort(key=lambda pair: pair[0])
        samples = [
            Sample(owner, s.prompt, s.completion, goal, s.pair, s.experts)
            for owner, p in owned
            for s, goal in zip(p.samples, p.goals(), strict=True)
        ]
        sums = train(self.model, banks, samples)
        for owner, part in owned:
            part.work.sums[part.key.member].add(sums[owner])

    def _learn(self, parts: Sequence[Part]) -> None:
        """Ask the base about all samples of members whose rewards depend on it, before the first of them is trained."""
        questions = [
            Sample(i, s.prompt, s.completion, experts=s.experts)
            for i, p in enumerate(parts)
            for s in p.work.samples[p.key.member]
        ]
        if not questions:
            return
        found = logprobs(self.model, None, questions, max_tokens=self.limits.max_tokens)
        for i, part in enumerate(parts):
            lengths = [len(s.completion) for s in part.work.samples[part.key.member]]
            flat = np.array(found[i], np.float32)
            part.work.learn(part.key.member, np.split(flat, np.cumsum(lengths)[:-1]))

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
            for wave in _waves(keys, self.limits.wave):
                slots = table.resident(wave, gradients=True)
                updates = [
                    Update(s, rates[k.member], table.page(k).optimizer, table.page(k).trained)
                    for s, k in zip(slots, wave, strict=True)
                ]
                for key, done in zip(wave, step(table.bank, updates, ranks=self.ranks), strict=True):
                    table.page(key).pending = False
                    if not done.skipped:
                        table.stepped(key)
                    if not done.moved:
                        raise NothingLearned(
                            f"member {key.member}: expected other weights after its first step (gradient norm "
                            f"{done.norm:g}, learning rate {rates[key.member]:g}), found the same: a rate below the "
                            "precision of its weights, or a step that does not reach them"
                        )
                    members[key.member] = c.MemberUpdate(step=done.step, grad_norm=done.norm, skipped=done.skipped)
        return c.OptimStepDone(members=members)

    def export(self, command: c.Export) -> c.ExportDone:
        run = self._run(command.header)
        if command.probes:
            self._check_probes(command.probes)
        mine: dict[str, bytes] = {}
        digests: dict[str, str] = {}
        for keys in self._by_table(run, command.header, command.members).values():
            table = run.tables[keys[0].member]
            bank = table.bank
            rows = [row.weights[None] for row in table.rows(keys)]
            for i, (row,) in zip(
                segments.dealt(len(keys), self.ranks), segments.whole(bank.shard, rows, self.ranks), strict=True
            ):
                mine[keys[i].member] = bank.shape.pack(row.numpy())
            digests.update({k.member: bank.shape.digest for k in keys})
        packed = segments.shared(mine, self.ranks) if command.probes else mine
        probes = self._probe(run, command, packed) if command.probes else {}
        weights = segments.write(run.store, mine, "segments", self.ranks)
        for member, data in packed.items():
            self.recent.keep(weights[member].digest, data)
        return c.ExportDone(
            weights={m: weights[m] for m in digests},
            shape_digests=digests,
            factor_digests={m: run.factors[m] for m in digests if m in run.factors},
            probe_logprobs=probes,
        )

    def _probe(self, run: Run, command: c.Export, packed: Mapping[str, bytes]) -> dict[str, tuple[float, ...]]:
        """Logprobs of the probe completions under the packed bytes, read back as a reader of the segment would."""
        result: dict[str, tuple[float, ...]] = {}
        for keys in self._by_table(run, command.header, command.members).values():
            table = run.tables[keys[0].member]
            bank = table.bank
            for wave in _waves(keys, bank.probes):
                slots = []
                for i, k in enumerate(wave):
                    row = bank.shard.take(from_bytes(bank.shape.unpack(packed[k.member])))
                    slots.append(bank.store_probe(i, row, scale=table.page(k).scale))
                samples = [Sample(slot, p.prompt, p.completion) for slot in slots for p in command.probes]
                values = logprobs(self.model, Banks([bank]), samples, max_tokens=self.limits.max_tokens)
                result.update({k.member: tuple(values[s]) for k, s in zip(wave, slots, strict=True)})
        return result

    def save_state(self, command: c.SaveState) -> c.SaveStateDone:
        run = self._run(command.header)
        groups = self._by_table(run, command.header, command.members)
        return c.SaveStateDone(states=self._save(run, [k for keys in groups.values() for k in keys]))

    def _save(self, run: Run, keys: Sequence[Key]) -> dict[str, c.ByteRange]:
        """Write newest rows as states; from then on they may be read from there."""
        by_table: dict[int, list[Key]] = {}
        for key in keys:
            by_table.setdefault(id(run.tables[key.member]), []).append(key)
        mine: dict[str, bytes] = {}
        for some in by_table.values():
            table = run.tables[some[0].member]
            state = StateShape(table.bank.shape)
            found = table.rows(some)
            rows = [torch.stack((row.weights, row.exp_avg, row.exp_avg_sq)) for row in found]
            for i, row in zip(
                segments.dealt(len(some), self.ranks), segments.whole(table.bank.shard, rows, self.ranks), strict=True
            ):
                weights, exp_avg, exp_avg_sq = row.numpy()
                mine[some[i].member] = state.pack(
                    weights=weights, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=found[i].step
                )
        states = segments.write(run.store, mine, "states", self.ranks)
        for key in keys:
            run.tables[key.member].saved(key, states[key.member])
        return {k.member: states[k.member] for k in keys}

    def _spill(self, rows: Sequence[Held]) -> None:
        by_run: dict[str, list[Key]] = {}
        for held in rows:
            by_run.setdefault(held.key.run, []).append(held.key)
        for name, keys in by_run.items():
            self._save(self._runs[name], keys)

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
        if adapter.stored_rank > self.limits.max_rank:
            twice = f" (twice {adapter.rank}, by baseMode Rank2r)" if adapter.stored_rank > adapter.rank else ""
            raise InvalidRequest(
                f"member {start.member}, rank: expected at most {self.limits.max_rank} (--max-rank), "
                f"found {adapter.stored_rank}{twice}"
            )
        if start.optimizer.clip <= 0:
            raise InvalidRequest(f"member {start.member}, clip: expected a positive norm, found {start.optimizer.clip}")
        kind = adapter.stored_rank, adapter.targets
        if kind not in self._shapes:
            try:
                self._shapes[kind] = AdapterShape.from_model(
                    self.model.config.raw, rank=adapter.stored_rank, targets=adapter.targets
                )
            except ShapeMismatch as e:
                raise InvalidRequest(f"member {start.member}: {e}") from e
        return self._shapes[kind]

    def _firsts(self, specs: Iterable[c.AdapterSpec]) -> dict[c.AdapterSpec, First]:
        """What members of these specs start from; those that a seed says are left out. Collective.

        Raises InvalidRequest for a spec that belongs to another base.
        """
        known = {spec: first for run in self._runs.values() for spec, first in run.firsts.items()}
        found: dict[c.AdapterSpec, First] = {}
        for spec in specs:
            if self._initialiser is not None:
                self._initialiser.check(spec)
            if spec.init.kind == "Standard":
                continue
            if self._initialiser is None:
                raise InvalidRequest(f"init {spec.init.kind}: expected Standard: this trainer has no files of its base")
            found[spec] = known.get(spec) or self._initialiser.first(spec)
        return found

    def _trained(self, table: PageTable, init: InitSpec) -> torch.Tensor | None:
        """What of this rank's part of a row trains; one mask for all rows of a shape."""
        key = table.bank.shape.digest, init
        if key not in self._masks:
            whole = rows.trained(table.bank.shape, init)
            mine = None if whole is None else table.bank.shard.take(whole).to(self.model.device)
            self._masks[key] = mine
        return self._masks[key]

    def _table(self, shape: AdapterShape) -> PageTable:
        """The bank of a shape, made when its first member appears."""
        if shape.digest not in self._tables:
            slots, shard = self.limits.slots, Shard(shape, self.ranks.place)
            self.model.bind(shard)
            bank = Bank(
                shard,
                slots=slots,
                gradients=self.limits.wave,
                probes=min(slots, PROBE_ROWS),
                device=self.model.device,
                dtype=self.model.dtype,
            )
            self._tables[shape.digest] = PageTable(bank, self.host, self.ranks)
        return self._tables[shape.digest]

    def _check_probes(self, probes: Sequence[c.ProbeSequence]) -> None:
        for i, probe in enumerate(probes):
            ids = (*probe.prompt, *probe.completion)
            if not probe.prompt or not probe.completion or min(ids) < 0 or max(ids) >= self.model.config.vocab:
                raise InvalidRequest(
                    f"probes[{i}]: expected a prompt and a completion of ids in 0..{self.model.config.vocab - 1}"
                )


def _row(first: First | None) -> torch.Tensor | None:
    return None if first is None else first.row


def _waves(keys: Sequence[Key], size: int) -> list[Sequence[Key]]:
    return [keys[i : i + size] for i in range(0, len(keys), size)]
