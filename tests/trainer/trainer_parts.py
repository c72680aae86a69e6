"""Real parts for trainer tests: a trainer on a folder store, samples."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from allele.format import AdapterShape
from allele.protocol import commands as c
from allele.protocol import samples as wire
from allele.protocol.initialisation import InitSpec
from allele.protocol.losses import LossSpec, MemberLoss, PolicyLoss
from allele.store import Objects, PopulationStore, bases
from allele_trainer.bank.rows import Row
from allele_trainer.bank.table import Key
from allele_trainer.initialisation.initialiser import Initialiser
from allele_trainer.model.build import BaseModel
from allele_trainer.server.shares import Shares
from allele_trainer.server.store import RunFactors, RunStore
from allele_trainer.server.trainer import Limits, Trainer
from allele_trainer.server.work import Part

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMESPACE, POPULATION = "lab", "mice"


@dataclasses.dataclass(frozen=True)
class Example:
    member: str
    prompt: list[int]
    completion: list[int]
    logprobs: list[float] | None = None
    advantage: float | None = None
    experts: list[int] | None = None
    loss: int = 0
    pair: int | None = None
    reference: list[float] | None = None
    teacher_prompt: list[int] | None = None
    teacher_ids: list[int] | None = None
    teacher_logprobs: list[float] | None = None

    @property
    def inputs(self) -> int:
        return len(self.prompt) + len(self.completion) - 1


def examples(members: Iterable[str], *, each: int, vocab: int, seed: int = 0) -> list[Example]:
    """`each` samples per member with ragged lengths; a member's samples depend on its name and the seed alone."""
    found = []
    for member in members:
        rng = np.random.default_rng([seed, *member.encode()])
        for _ in range(each):
            prompt, completion = (rng.integers(0, vocab, rng.integers(1, 9)).tolist() for _ in range(2))
            logprobs = (-np.log(vocab) + rng.normal(size=len(completion))).astype(np.float32).tolist()
            found.append(Example(member, prompt, completion, logprobs, float(np.float32(rng.normal()))))
    return found


def batch(header: c.ForwardBackward, found: Sequence[Example]) -> bytes:
    columns = {f.name: [getattr(e, f.name) for e in found] for f in dataclasses.fields(Example)}
    return wire.encode(header, wire.TRAIN, columns)


class Rig:
    """A trainer without its server, on a store in a folder, and short ways to command it."""

    def __init__(
        self,
        model: BaseModel,
        folder: pathlib.Path,
        *,
        slots: int = 16,
        wave: int | None = None,
        max_tokens: int = 8192,
        host_memory: int = 1 << 30,
        base: pathlib.Path | None = None,
    ) -> None:
        """`base`: the model's folder, for members that start from it."""
        self.folder = folder
        self.store = PopulationStore.open(f"file://{folder}", namespace=NAMESPACE, population=POPULATION)
        self.model = model
        limits = Limits(slots=slots, wave=wave or slots, max_rank=16, max_tokens=max_tokens, host_memory=host_memory)
        self.initialiser = None
        if base is not None:
            digest = bases.digest(base)
            factors = RunFactors(Objects.open(f"file://{folder}"), digest)
            self.initialiser = Initialiser(base, digest=digest, store=factors, ranks=model.ranks)
        self.trainer = Trainer(
            model, open_store=lambda _ns, _name: RunStore(self.store), limits=limits, initialiser=self.initialiser
        )

    def header(self, run: str = "run") -> c.Header:
        return c.Header(run=run, epoch=1, incarnation="i", seq=1)

    def reset(self, starts: Sequence[c.MemberStart], *, run: str = "run") -> None:
        self.trainer.reset(c.Reset(run=run, epoch=1, namespace=NAMESPACE, population=POPULATION, members=tuple(starts)))

    def admit(self, *members: str, run: str = "run") -> dict[str, int]:
        return self.trainer.admit(c.Admit(header=self.header(run), members=members)).slots

    def forward_backward(
        self,
        found: Sequence[Example],
        *,
        run: str = "run",
        mode: c.Mode = "Batched",
        losses: Sequence[LossSpec] = (PolicyLoss(),),
    ) -> Mapping[str, MemberLoss]:
        command = c.ForwardBackward(header=self.header(run), losses=tuple(losses))
        work = self.trainer.begin(*wire.decode(batch(command, found), c.ForwardBackward, wire.TRAIN))
        shares: Shares[Part] = Shares(max_tokens=self.trainer.limits.max_tokens, max_members=self.trainer.limits.wave)
        shares.add(run, work.units, mode=mode)
        while units := shares.next():
            self.trainer.train([u.work for _, u in units])
        return work.done().members

    def optim_step(self, rates: Mapping[str, float], *, run: str = "run") -> Mapping[str, c.MemberUpdate]:
        command = c.OptimStep(header=self.header(run), learning_rates=dict(rates))
        return self.trainer.optim_step(command).members

    def step(
        self, found: Sequence[Example], *, rate: float = 1e-3, wave: int = 1 << 20, run: str = "run"
    ) -> dict[str, c.MemberUpdate]:
        """One step of all members in the samples, as a driver does it: in waves of at most `wave` members."""
        members = list(dict.fromkeys(e.member for e in found))
        updates: dict[str, c.MemberUpdate] = {}
        for i in range(0, len(members), wave):
            part = members[i : i + wave]
            self.admit(*part, run=run)
            self.forward_backward([e for e in found if e.member in part], run=run)
            updates.update(self.optim_step(dict.fromkeys(part, rate), run=run))
        return updates

    def export(self, *members: str, probes: Sequence[c.ProbeSequence] = (), run: str = "run") -> c.ExportDone:
        return self.trainer.export(c.Export(header=self.header(run), members=members, probes=tuple(probes)))

    def save(self, *members: str) -> dict[str, c.ByteRange]:
        return self.trainer.save_state(c.SaveState(header=self.header(), members=members)).states

    def row(self, member: str, *, run: str = "run") -> Row:
        return self.trainer._runs[run].tables[member].row(Key(run, member))

    def shape(self, spec: c.AdapterSpec) -> AdapterShape:
        return AdapterShape.from_model(self.model.config.raw, rank=spec.stored_rank, targets=spec.targets)

    def random_weights(self, member: str, spec: c.AdapterSpec, *, seed: int) -> c.ByteRange:
        """A packed adapter in the store whose A and B are both random: no gradient of its first step is zero."""
        shape = self.shape(spec)
        row = np.random.default_rng(seed).normal(0, 0.05, shape.numel).astype(np.float32)
        return self.store.write_segments({member: shape.pack(row)})[member]


def start(
    member: str,
    spec: c.AdapterSpec,
    *,
    seed: int = 0,
    optimizer: c.OptimizerSpec | None = None,
    weights: c.ByteRange | None = None,
    state: c.ByteRange | None = None,
) -> c.MemberStart:
    rule = optimizer or c.OptimizerSpec()
    return c.MemberStart(member=member, adapter=spec, optimizer=rule, seed=seed, weights=weights, state=state)


def adapter(
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = ALL,
    scaling: str = "Standard",
    init: InitSpec = InitSpec(),
) -> c.AdapterSpec:
    return c.AdapterSpec(rank=rank, alpha=alpha, targets=tuple(targets), scaling=scaling, init=init)  # type: ignore[arg-type]


def same_rows(one: Row, other: Row) -> bool:
    """Bit-equal weights, moments and step."""
    return one.step == other.step and all(
        torch.equal(getattr(one, f), getattr(other, f)) for f in ("weights", "exp_avg", "exp_avg_sq")
    )
