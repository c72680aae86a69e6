"""One process of a layout that finds out how many slots fit; the second rank has less memory than the first.

python -m tests.trainer.parallel.capacity_rank '[{"layout": {"tp": 2}, "base": …, "out": …}]'  with torchrun's
environment
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import torch
from megatron.core import parallel_state

from allele_trainer.model.build import build
from allele_trainer.parallel import Layout, initialise
from allele_trainer.server import capacity
from allele_trainer.server.capacity import _Try, probe

FREE = (512 << 20, 200 << 20)
REFUSED_ABOVE = 32
"""Slots that the second rank's allocator has room for, whatever it said before."""


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        ranks = initialise(Layout(**job["layout"]))
        model, found = build(pathlib.Path(job["base"]), ranks), {}
        capacity.free_memory = lambda: FREE[ranks.rank]  # noqa: B023 - called in this round alone
        found["free"] = probe(model, max_rank=8, max_tokens=256)
        allocates = _Try._allocates

        def refusing(self: _Try, slots: int, beside: int) -> bool:
            return (ranks.rank == 0 or slots <= REFUSED_ABOVE) and allocates(self, slots, beside)  # noqa: B023

        _Try._allocates = refusing  # type: ignore[method-assign]
        found["refused"] = probe(model, max_rank=8, max_tokens=256)
        _Try._allocates = allocates  # type: ignore[method-assign]
        text = json.dumps({name: dataclasses.asdict(value) for name, value in found.items()})
        (pathlib.Path(job["out"]) / f"{ranks.rank}.json").write_text(text)
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
