"""One process of a layout: trains the cohort on its shards and writes what it holds and was told.

python -m tests.trainer.parallel.rank '{"tp": 2}' BASE OUT     with torchrun's environment
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import numpy as np
import torch
from megatron.core import parallel_state

from allele.format import AdapterShape
from allele.protocol.losses import PolicyLoss
from allele_trainer.bank.banks import Banks
from allele_trainer.bank.rows import Bank, Row
from allele_trainer.bank.shard import Shard
from allele_trainer.bank.start import fresh
from allele_trainer.bank.step import Update, step
from allele_trainer.model.build import BaseModel, build
from allele_trainer.parallel import Layout, initialise
from allele_trainer.rl.goals import goals
from allele_trainer.rl.packing import Sample, micro_batches
from allele_trainer.rl.passes import logprobs, train
from allele_trainer.rl.samples import MemberSample
from tests.trainer.parallel import cohort
from tests.trainer.trainer_parts import Example

PARTS = ("weights", "exp_avg", "exp_avg_sq")


class Trainee:
    """Members of one shape in one bank."""

    def __init__(self, model: BaseModel, members: list[str]) -> None:
        self.model, self.members = model, members
        shape = cohort.shape(model.config.raw, members[0])
        self.shard = Shard(shape, model.ranks.place)
        self.bank = Bank(self.shard, slots=4, probes=1, device=model.device)
        for slot, member in enumerate(members):
            self.store(slot, member, fresh(torch.from_numpy(cohort.first_weights(shape, member))))

    def store(self, slot: int, member: str, whole: Row) -> None:
        parts = (self.shard.take(t).contiguous() for t in (whole.weights, whole.exp_avg, whole.exp_avg_sq))
        self.bank.store(slot, Row(*parts, step=whole.step), scale=cohort.SPECS[member].scale)


class Cohort:
    """Trainees whose micro-batches are passes over all of their banks."""

    def __init__(self, model: BaseModel, trainees: list[Trainee]) -> None:
        self.model, self.trainees = model, trainees
        self.banks = Banks(t.bank for t in trainees)
        self.owners = {
            member: self.banks.owner(place, slot)
            for place, trainee in enumerate(trainees)
            for slot, member in enumerate(trainee.members)
        }

    def samples(self, number: int) -> list[Sample]:
        every = cohort.samples(number, model=self.model.config.raw["model_type"])
        found: list[Sample] = []
        for member, owner in self.owners.items():
            mine = [_read(e) for e in every if e.member == member]
            made = zip(mine, goals(mine, PolicyLoss()), strict=True)
            found += [Sample(owner, s.prompt, s.completion, goal, experts=s.experts) for s, goal in made]
        return found

    def step(self, number: int, report: dict[str, dict[str, list[float]]]) -> None:
        """One step of every member: several micro-batches, then one update of each bank."""
        losses = dict.fromkeys(self.owners.values(), 0.0)
        batches = micro_batches(self.samples(number), max_tokens=cohort.MAX_TOKENS)
        assert len(batches) > 1 and all(len({s.owner for s in batch}) > 1 for batch in batches)
        assert any(len({self.banks.slot(s.owner)[0] for s in batch}) > 1 for batch in batches)
        for batch in batches:
            for owner, sums in train(self.model, self.banks, batch).items():
                losses[owner] += sums.loss
        for trainee in self.trainees:
            updates = [Update(slot, cohort.RATES[m], cohort.RULES[m]) for slot, m in enumerate(trainee.members)]
            for member, done in zip(trainee.members, step(trainee.bank, updates, ranks=self.model.ranks), strict=True):
                report[member]["norms"].append(done.norm)
                report[member]["losses"].append(losses[self.owners[member]])


def _read(e: Example) -> MemberSample:
    experts = None if e.experts is None else np.array(e.experts, np.int16).reshape(e.inputs, cohort.LAYERS, -1)
    return MemberSample(**(vars(e) | {"experts": experts}))


@dataclasses.dataclass(frozen=True)
class Saved:
    """Rows that the ranks of some layout saved after `cohort.SAVED` steps."""

    layout: Layout
    out: pathlib.Path

    def whole(self, member: str, shape: AdapterShape) -> Row:
        parts = {name: torch.full((shape.numel,), torch.nan) for name in PARTS}
        for rank in range(self.layout.processes):
            rows = torch.load(self.out / f"saved-{rank}.pt")[member]
            for name, whole in parts.items():
                Shard(shape, self.layout.place(rank)).put(rows[name], whole)
        return Row(**parts, step=cohort.SAVED)


def run(layout: Layout, base: pathlib.Path, out: pathlib.Path, saved: Saved | None) -> None:
    ranks = initialise(layout)
    model = build(base, ranks)
    by_shape: dict[str, list[str]] = {}
    for member in cohort.SPECS:
        by_shape.setdefault(cohort.shape(model.config.raw, member).digest, []).append(member)
    trainees = [Trainee(model, members) for members in by_shape.values()]
    trained = Cohort(model, trainees)
    report: dict[str, dict[str, list[float]]] = {m: {"norms": [], "losses": []} for m in cohort.SPECS}
    rows: dict[str, dict[str, torch.Tensor]] = {m: {} for m in cohort.SPECS}
    for trainee in trainees if saved else ():
        for slot, member in enumerate(trainee.members):
            trainee.store(slot, member, saved.whole(member, trainee.shard.shape))
    for number in range(cohort.SAVED if saved else 0, cohort.STEPS):
        trained.step(number, report)
        for trainee in trainees:
            for slot, member in enumerate(trainee.members):
                row = trainee.bank.load(slot)
                if number == 0:
                    rows[member]["first"] = row.exp_avg
                rows[member] |= {name: getattr(row, name) for name in PARTS}
        if number + 1 == cohort.SAVED:
            torch.save(rows, out / f"saved-{ranks.rank}.pt")
            torch.distributed.barrier()
    found = logprobs(model, trained.banks, trained.samples(0), max_tokens=cohort.MAX_TOKENS)
    after = {member: found[owner] for member, owner in trained.owners.items()}
    torch.save({"rows": rows, "report": report, "logprobs": after}, out / f"{ranks.rank}.pt")


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        saved = job.get("saved")
        run(
            Layout(**job["layout"]),
            pathlib.Path(job["base"]),
            pathlib.Path(job["out"]),
            saved and Saved(Layout(**saved["layout"]), pathlib.Path(saved["out"])),
        )
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
