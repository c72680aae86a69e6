"""What is exported is what was trained: other software reads it and computes the same."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import torch

from allele.protocol import commands as c
from tests.trainer.trainer_parts import Rig, adapter, examples, start
from tests.trainer.twin import PeftTwin

PROBES = (c.ProbeSequence(prompt=(5, 6, 7), completion=(8, 9)), c.ProbeSequence(prompt=(40,), completion=(41, 42, 43)))


def trained(rig: Rig, members: list[str]) -> None:
    rig.reset([start(m, adapter(alpha=8 + 8 * i), seed=i) for i, m in enumerate(members)])
    for step in range(3):
        rig.step(examples(members, each=4, vocab=96, seed=step), rate=1e-2, wave=4)


def test_exported_adapter_gives_the_same_logprobs_in_peft(
    rig: Callable[..., Rig], base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    mine = rig(slots=4)
    trained(mine, ["a", "b"])
    done = mine.export("a", "b", probes=PROBES)
    for i, member in enumerate("ab"):
        packed = mine.store.read(done.weights[member])
        twin = PeftTwin(base, mine.shape(adapter()), packed, adapter(alpha=8 + 8 * i), tmp_path / member)
        with torch.no_grad():
            expected = torch.cat([twin.logprobs(p.prompt, p.completion) for p in PROBES])
        found = torch.tensor(done.probe_logprobs[member])
        assert (found - expected).abs().max() < 1e-5
        assert done.shape_digests[member] == twin.shape.digest
    assert max(abs(x - y) for x, y in zip(*(done.probe_logprobs[m] for m in "ab"), strict=True)) > 1e-3


def test_members_in_slots_and_out_of_slots_are_exported_with_their_bits(rig: Callable[..., Rig]) -> None:
    mine = rig(slots=2)
    members = [f"m{i}" for i in range(5)]
    mine.reset([start(m, adapter(), seed=i) for i, m in enumerate(members)])
    mine.step(examples(members[:4], each=3, vocab=96), rate=1e-2, wave=2)  # m4 was never admitted
    done = mine.export(*members, probes=PROBES)
    shape = mine.shape(adapter())
    for member in members:
        data = np.frombuffer(shape.unpack(mine.store.read(done.weights[member])), np.float32)
        assert np.array_equal(data, mine.row(member).weights.numpy())
    assert len({r.path for r in done.weights.values()}) == 1
    alone = {m: mine.export(m, probes=PROBES).probe_logprobs[m] for m in members}
    assert done.probe_logprobs == alone


def test_export_changes_nothing_of_the_training(rig: Callable[..., Rig]) -> None:
    rows = []
    for exports in (False, True):
        mine = rig(slots=2)
        mine.reset([start("a", adapter(), seed=1)])
        mine.admit("a")
        mine.forward_backward(examples(["a"], each=3, vocab=96))
        if exports:  # between gradient and step
            mine.export("a", probes=PROBES)
        mine.optim_step({"a": 1e-2})
        rows.append(mine.row("a").weights)
    assert torch.equal(*rows)
