"""4,096 members over 64 slots: each is stepped, and has the bits of a bank that holds them all."""

from __future__ import annotations

import dataclasses
import pathlib
import resource
import time

import pytest

from allele.protocol import commands as c
from allele_trainer.model.build import build
from tests.trainer.random_base import write_base
from tests.trainer.trainer_parts import Rig, adapter, examples, same_rows, start

MEMBERS = [f"m{i:04d}" for i in range(4096)]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 48,
}
STEPS = 2


@dataclasses.dataclass
class Peak:
    """Most bytes of rows, in slots and in host memory, at any admission."""

    rig: Rig
    slots: int = 0
    host: int = 0

    def look(self) -> None:
        self.slots = max(self.slots, sum(t.bank.nbytes for t in self.rig.trainer._tables.values()))
        self.host = max(self.host, self.rig.trainer.host.used)


def trained(rig: Rig, *, wave: int, ahead: bool) -> Peak:
    rig.reset([start(m, adapter(rank=4, alpha=8), seed=i) for i, m in enumerate(MEMBERS)])
    waves = [MEMBERS[i : i + wave] for i in range(0, len(MEMBERS), wave)]
    peak = Peak(rig)
    for step in range(STEPS):
        found = {e.member: e for e in examples(MEMBERS, each=1, vocab=48, seed=step)}
        for number, members in enumerate(waves):
            following = waves[(number + 1) % len(waves)] if ahead else []
            rig.trainer.admit(c.Admit(header=rig.header(), members=tuple(members), next=tuple(following)))
            rig.forward_backward([found[m] for m in members])
            updates = rig.optim_step(dict.fromkeys(members, 5e-3))
            assert all(u.step == step + 1 and not u.skipped for u in updates.values())
            peak.look()
    return peak


@pytest.mark.slow
def test_4096_members_over_64_slots_equal_4096_slots(tmp_path: pathlib.Path) -> None:
    model = build(write_base(tmp_path / "base", **SIZES))
    began = time.perf_counter()
    few = Rig(model, tmp_path / "few", slots=64, wave=32)
    paged = trained(few, wave=32, ahead=True)
    seconds = time.perf_counter() - began
    all_in = Rig(model, tmp_path / "all", slots=4096)
    resident = trained(all_in, wave=4096, ahead=False)
    different = [m for m in MEMBERS if not same_rows(few.row(m), all_in.row(m))]
    assert not different
    row = 12 * few.shape(adapter(rank=4)).numel
    print(
        f"4,096 members, {row / 1024:.0f} KiB each with its moments, {STEPS} steps in {seconds:.1f} s: rows in slots "
        f"{paged.slots / 2**20:.1f} MiB over 64 slots, {resident.slots / 2**20:.1f} MiB over 4,096; host memory "
        f"{paged.host / 2**20:.1f} MiB; process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    )
    assert paged.slots < resident.slots / 60
    assert paged.host <= len(MEMBERS) * row
    assert few.trainer.host.spilled == 0
