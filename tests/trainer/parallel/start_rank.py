"""One process of a layout whose members start from the base: trains them and writes its part of their rows.

python -m tests.trainer.parallel.start_rank '[{"layout": {"tp": 2}, "base": …, "out": …}]'  with torchrun's environment
"""

from __future__ import annotations

import json
import pathlib
import sys

import torch
from megatron.core import parallel_state

from allele.protocol import commands as c
from allele.protocol.initialisation import InitSpec
from allele_trainer.model.build import BaseModel, build
from allele_trainer.parallel import Layout, initialise
from tests.trainer.trainer_parts import Rig, adapter, examples, start

SPECS = {
    "doubled": adapter(alpha=4, init=InitSpec(kind="PiSSA", base_mode="Rank2r")),
    "micro": adapter(alpha=4, rank=4, targets=("q_proj", "o_proj", "up_proj"), init=InitSpec(kind="MiCA")),
}
RULE = c.OptimizerSpec(weight_decay=0.2, clip=0.3)


def trained(model: BaseModel, base: pathlib.Path, out: pathlib.Path) -> dict[str, object]:
    """First rows, rows after three steps (this rank's part) and norms, by member; modules whose factors it computed."""
    rig = Rig(model, out / "store", base=base)
    rig.reset([start(m, spec, optimizer=RULE) for m, spec in SPECS.items()])
    rig.admit(*SPECS)
    first = {m: rig.row(m).weights.clone() for m in SPECS}
    norms = [{m: u.grad_norm for m, u in rig.step(examples(SPECS, each=2, vocab=96, seed=s)).items()} for s in range(3)]
    assert rig.initialiser is not None
    return {
        "first": first,
        "last": {m: rig.row(m).weights for m in SPECS},
        "norms": norms,
        "computed": rig.initialiser.source.computed,
    }


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        base, out = pathlib.Path(job["base"]), pathlib.Path(job["out"])
        ranks = initialise(Layout(**job["layout"]))
        torch.save(trained(build(base, ranks), base, out), out / f"{ranks.rank}.pt")
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
