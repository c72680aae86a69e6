"""One process of some layouts: one pass of members with different losses on its shards; writes their gradients.

python -m tests.trainer.parallel.company_rank '[[BASE, {"tp": 2}], …]' OUT     with torchrun's environment
"""

from __future__ import annotations

import json
import pathlib
import sys

import torch
from megatron.core import parallel_state

from allele.format import AdapterShape
from allele_trainer.bank.banks import Banks
from allele_trainer.bank.rows import Bank
from allele_trainer.bank.shard import Shard
from allele_trainer.bank.start import fresh
from allele_trainer.model.build import BaseModel, build
from allele_trainer.parallel import Layout, initialise
from allele_trainer.rl.goals import goals, penalises_rewards
from allele_trainer.rl.packing import Sample, micro_batches
from allele_trainer.rl.passes import logprobs, train
from allele_trainer.rl.samples import MemberSample
from tests.trainer.parallel import cohort
from tests.trainer.test_losses_in_company import LOSSES, MEMBERS, rows


def gradients(model: BaseModel) -> tuple[torch.Tensor, dict[str, float]]:
    """This rank's part of each member's gradient, summed over data ranks, and each member's loss."""
    shape = AdapterShape.from_model(model.config.raw, rank=4, targets=cohort.SPECS["all"].targets)
    shard = Shard(shape, model.ranks.place)
    bank = Bank(shard, slots=len(MEMBERS), probes=1, device=model.device)
    found: list[Sample] = []
    for slot, member in enumerate(MEMBERS):
        weights = 0.05 * torch.randn(shape.numel, generator=torch.Generator().manual_seed(slot))
        bank.store(slot, fresh(shard.take(weights).contiguous()), scale=2)
        mine = [MemberSample(**vars(e)) for e in rows([member])]
        references = None
        if penalises_rewards(LOSSES[member]):
            questions = [Sample(0, s.prompt, s.completion) for s in mine]
            flat = torch.tensor(logprobs(model, None, questions, max_tokens=cohort.MAX_TOKENS)[0])
            references = [part.numpy() for part in flat.split([len(s.completion) for s in mine])]
        made = goals(mine, LOSSES[member], references=references)
        found += [Sample(slot, s.prompt, s.completion, g, s.pair) for s, g in zip(mine, made, strict=True)]
    losses = dict.fromkeys(MEMBERS, 0.0)
    for batch in micro_batches(found, max_tokens=cohort.MAX_TOKENS):
        for slot, sums in train(model, Banks([bank]), batch).items():
            losses[MEMBERS[slot]] += sums.loss
    gradient = torch.stack([bank.gradient(slot) for slot in range(len(MEMBERS))])
    model.ranks.sum_gradients(gradient, shard)
    return gradient, losses


def main() -> None:
    torch.set_num_threads(1)
    out = pathlib.Path(sys.argv[2])
    for number, (base, fields) in enumerate(json.loads(sys.argv[1])):
        ranks = initialise(Layout(**fields))
        gradient, losses = gradients(build(pathlib.Path(base), ranks))
        torch.save({"gradient": gradient, "losses": losses}, out / f"{number}-{ranks.rank}.pt")
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
