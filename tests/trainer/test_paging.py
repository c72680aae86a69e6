"""Rows move between slots, host memory and the store, and nobody can tell from what is trained."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable

import pytest
import torch

from allele.protocol import commands as c
from allele.protocol.errors import InvalidRequest, Overloaded, Unavailable
from allele_trainer.bank.banks import Banks
from allele_trainer.bank.rows import StaleSlot
from allele_trainer.bank.table import Key, PageTable
from allele_trainer.lora.plan import plan, routed
from tests.trainer.trainer_parts import NAMESPACE, Rig, adapter, examples, same_rows, start

MEMBERS = [f"m{i}" for i in range(6)]
STEPS = [examples(MEMBERS, each=2, vocab=96, seed=s) for s in range(3)]
ALPHAS = {m: 4.0 + 3 * i for i, m in enumerate(MEMBERS)}


def begin(rig: Rig, members: list[str] = MEMBERS) -> Rig:
    rig.reset([start(m, adapter(alpha=ALPHAS[m]), seed=i) for i, m in enumerate(members)])
    return rig


def table(rig: Rig) -> PageTable:
    (found,) = rig.trainer._tables.values()
    return found


def row_bytes(rig: Rig) -> int:
    return rig.trainer.host.row_bytes(rig.shape(adapter()).numel)


@pytest.fixture
def all_in(rig: Callable[..., Rig]) -> Rig:
    """What every way of paging has to end with."""
    mine = begin(rig(slots=len(MEMBERS)))
    for found in STEPS:
        mine.step(found, rate=5e-3)
    return mine


def equal(one: Rig, other: Rig) -> bool:
    return all(same_rows(one.row(m), other.row(m)) for m in MEMBERS)


@pytest.mark.parametrize("wave", [1, 2, 4])
def test_members_that_share_slots_train_as_if_each_had_one(rig: Callable[..., Rig], all_in: Rig, wave: int) -> None:
    """Scales differ: one applied twice, or kept from the slot's last member, would show; so would moments and steps."""
    mine = begin(rig(slots=4, wave=wave))
    for found in STEPS:
        mine.step(found, rate=5e-3, wave=wave)
    assert table(mine).loaded > len(MEMBERS)
    assert equal(mine, all_in)


def test_only_rows_that_changed_are_written_back(rig: Callable[..., Rig]) -> None:
    mine = begin(rig(slots=2))
    mine.admit("m0", "m1")
    mine.admit("m2", "m3")
    assert (table(mine).written_back, table(mine).clean) == (0, 2)
    mine.forward_backward([e for e in STEPS[0] if e.member in ("m2", "m3")])
    mine.optim_step({"m2": 5e-3})
    mine.admit("m4", "m5")
    assert (table(mine).written_back, table(mine).clean) == (1, 3)
    mine.admit("m2", "m3")
    before = mine.row("m2")
    mine.admit("m0", "m1")
    assert (table(mine).written_back, table(mine).clean) == (1, 7)
    assert same_rows(mine.row("m2"), before) and before.step == 1


def test_a_gradient_waits_in_host_memory_for_its_step(rig: Callable[..., Rig]) -> None:
    rows = []
    for away in (False, True):
        mine = begin(rig(slots=2))
        mine.admit("m0")
        mine.forward_backward([e for e in STEPS[0] if e.member == "m0"])
        if away:
            mine.admit("m1", "m2")
            assert table(mine).page(Key("run", "m0")).slot is None
            assert mine.trainer.host.used > 0
        mine.admit("m0")
        mine.forward_backward([e for e in STEPS[1] if e.member == "m0"])  # adds to what came back
        mine.optim_step({"m0": 5e-3})
        rows.append(mine.row("m0"))
    assert same_rows(*rows)
    assert mine.trainer.host.used == 0


def test_a_slot_keeps_nothing_of_its_last_member(rig: Callable[..., Rig]) -> None:
    used, fresh = begin(rig(slots=1)), begin(rig(slots=1))
    used.step([e for e in STEPS[0] if e.member == "m5"], rate=0.5)
    used.admit("m5")
    used.forward_backward([e for e in STEPS[1] if e.member == "m5"])  # and a gradient that no step took
    for mine in (used, fresh):
        for found in STEPS:
            mine.step([e for e in found if e.member == "m0"], rate=5e-3)
    assert same_rows(used.row("m0"), fresh.row("m0"))
    assert used.row("m0").step == len(STEPS)


def test_a_plan_for_a_slot_that_was_given_away_is_refused(rig: Callable[..., Rig]) -> None:
    mine = begin(rig(slots=1))
    mine.admit("m0")
    bank = table(mine).bank
    routes = plan(Banks([bank]), [(0, 3)], padded=64, gradients=True)
    with routed(routes):
        pass
    mine.admit("m1")
    with pytest.raises(StaleSlot, match="slot 0: expected version"), routed(routes):
        pass
    seen = {bank.versions[0]}
    for member in ("m0", "m1", "m0"):  # the same member back in the same slot is still another version
        mine.admit(member)
        assert bank.versions[0] not in seen
        seen.add(bank.versions[0])


def test_beyond_host_memory_rows_go_to_the_store_and_come_back(
    rig: Callable[..., Rig], all_in: Rig, tmp_path: pathlib.Path
) -> None:
    mine = begin(rig(slots=2))
    mine.trainer.host.capacity = limit = 2 * row_bytes(mine)
    for found in STEPS:
        for member in MEMBERS:
            mine.step([e for e in found if e.member == member], rate=5e-3)
            assert mine.trainer.host.used <= limit
    assert mine.trainer.host.spilled >= len(MEMBERS)
    assert list((tmp_path / "store").rglob("states/*.seg"))
    assert equal(mine, all_in)


def test_a_row_whose_state_is_saved_is_dropped_and_read_again(rig: Callable[..., Rig]) -> None:
    mine = begin(rig(slots=2))
    for found in STEPS:
        mine.step(found, rate=5e-3, wave=2)
    saved = {m: mine.row(m) for m in MEMBERS}
    mine.save(*MEMBERS)
    host = mine.trainer.host
    host.capacity = 2 * row_bytes(mine)
    mine.step([e for e in STEPS[0] if e.member in ("m0", "m1")], rate=5e-3)  # these two have changed since
    mine.admit("m4", "m5")
    assert host.used == host.capacity and host.spilled == 0 and host.dropped > 0
    assert all(same_rows(mine.row(m), saved[m]) for m in MEMBERS[2:])


def test_two_members_take_turns_where_host_memory_holds_one(rig: Callable[..., Rig], all_in: Rig) -> None:
    mine = begin(rig(slots=1))
    mine.trainer.host.capacity = row_bytes(mine)
    for found in STEPS:
        for member in ("m0", "m1"):
            mine.step([e for e in found if e.member == member], rate=5e-3)
    assert all(same_rows(mine.row(m), all_in.row(m)) for m in ("m0", "m1"))


def test_when_the_store_takes_no_rows_nothing_is_lost(
    rig: Callable[..., Rig], all_in: Rig, tmp_path: pathlib.Path
) -> None:
    mine = begin(rig(slots=1))
    mine.trainer.host.capacity = row_bytes(mine)
    folder = tmp_path / "store" / NAMESPACE
    refused = 0
    for found in STEPS:
        for member in MEMBERS:
            part = [e for e in found if e.member == member]
            folder.parent.mkdir(exist_ok=True)
            if folder.exists():
                folder.rename(tmp_path / "away")
            folder.write_text("a file where the store's folder was")
            try:
                mine.admit(member)
            except Unavailable:
                refused += 1
            folder.unlink()
            if (tmp_path / "away").exists():
                (tmp_path / "away").rename(folder)
            mine.step(part, rate=5e-3)
    assert refused > len(MEMBERS)
    assert equal(mine, all_in)


def test_a_row_that_lies_in_host_memory_beside_its_slot_is_kept_when_it_leaves_the_slot(
    rig: Callable[..., Rig],
) -> None:
    mine = begin(rig(slots=2))
    for member in ("m0", "m4"):
        mine.step([e for e in STEPS[0] if e.member == member], rate=5e-3)
    mine.admit("m2", "m3")  # m0 and m4 are in host memory
    mine.step([e for e in STEPS[0] if e.member == "m1"], rate=5e-3)
    mine.admit("m0", "m1")  # m0 is in a slot as well, m1 in a slot alone
    before = {m: mine.row(m) for m in ("m0", "m1", "m4")}
    host = mine.trainer.host
    host.capacity = host.used + row_bytes(mine) * 2 // 3
    mine.trainer.evict(c.Evict(header=mine.header(), members=("m0", "m1")))
    assert host.spilled > 0
    assert all(same_rows(mine.row(m), before[m]) and before[m].step == 1 for m in before)


def test_host_memory_that_holds_no_row_refuses_the_reset(rig: Callable[..., Rig]) -> None:
    with pytest.raises(
        InvalidRequest, match=r"host memory: expected at least \d+ bytes for one adapter of rank 8, found"
    ):
        begin(rig(slots=1, host_memory=1000))


def test_more_rows_at_once_than_host_memory_holds_go_out_one_after_the_other(
    rig: Callable[..., Rig], all_in: Rig
) -> None:
    mine = begin(rig(slots=3))
    mine.trainer.host.capacity = 2 * row_bytes(mine)
    for found in STEPS:
        mine.step(found, rate=5e-3, wave=3)
    assert mine.trainer.host.spilled > 0
    assert equal(mine, all_in)


def test_host_memory_full_of_waiting_gradients_asks_to_come_back(rig: Callable[..., Rig]) -> None:
    mine = begin(rig(slots=1))
    mine.trainer.host.capacity = 10
    mine.admit("m0")
    mine.forward_backward([e for e in STEPS[0] if e.member == "m0"])
    with pytest.raises(Overloaded, match=r"host memory: expected room for \d+ bytes of 10"):
        mine.admit("m1")
    mine.optim_step({"m0": 5e-3})
    mine.trainer.host.capacity = row_bytes(mine)
    mine.admit("m1")


def test_the_next_wave_comes_in_while_this_one_is_there(rig: Callable[..., Rig], all_in: Rig) -> None:
    mine = begin(rig(slots=4, wave=2))
    waves = [MEMBERS[i : i + 2] for i in range(0, 6, 2)]
    for found in STEPS:
        for i, wave in enumerate(waves):
            mine.trainer.admit(c.Admit(header=mine.header(), members=tuple(wave), next=tuple(waves[(i + 1) % 3])))
            if found is not STEPS[0]:  # in the first step they are read from their seeds, in a thread
                assert all(table(mine).page(Key("run", m)).slot is not None for m in (*wave, *waves[(i + 1) % 3]))
            mine.forward_backward([e for e in found if e.member in wave])
            mine.optim_step(dict.fromkeys(wave, 5e-3))
    assert equal(mine, all_in)


def test_prefetching_a_state_that_is_gone_is_told_when_it_is_wanted(rig: Callable[..., Rig]) -> None:
    mine = begin(rig(slots=4, wave=2))
    mine.step(STEPS[0], rate=5e-3, wave=2)
    gone = mine.save("m2")["m2"].model_copy(update={"path": "states/none.seg"})
    mine.reset([start("m0", adapter(), seed=0), start("m2", adapter(), state=gone)])
    mine.trainer.admit(c.Admit(header=mine.header(), members=("m0",), next=("m2",)))
    mine.step([e for e in STEPS[0] if e.member == "m0"])
    with pytest.raises(Exception, match=r"none\.seg"):
        mine.admit("m2")


def test_a_hundred_thousand_members_cost_a_reset_little_and_an_admission_nothing(rig: Callable[..., Rig]) -> None:
    spec, rule = adapter(), c.OptimizerSpec()
    starts = [
        c.MemberStart.model_construct(member=f"m{i}", adapter=spec, optimizer=rule, seed=i, state=None, weights=None)
        for i in range(100_000)
    ]
    mine = rig(slots=4)
    command = c.Reset.model_construct(run="run", epoch=1, namespace=NAMESPACE, population="mice", members=tuple(starts))
    began = time.process_time()
    mine.trainer.reset(command)
    reset = time.process_time() - began
    mine.admit("m0")
    began = time.process_time()
    for i in range(200):
        mine.admit(f"m{99_999 - i}")
    admit = (time.process_time() - began) / 200
    print(f"reset of 100,000 members: {reset:.2f} s; one admission: {admit * 1e3:.2f} ms")
    assert reset < 5 and admit < 0.02
    mine.trainer.drop("run")
    assert mine.trainer.used == 0


def test_moments_are_zero_when_a_member_starts_from_weights_in_a_used_slot(rig: Callable[..., Rig]) -> None:
    mine = begin(rig(slots=1))
    weights = mine.random_weights("m0", adapter(), seed=3)
    mine.step([e for e in STEPS[0] if e.member == "m1"], rate=0.1)
    mine.reset([start("m0", adapter(), weights=weights)])
    mine.admit("m0")
    row = mine.row("m0")
    assert row.step == 0 and not row.exp_avg.any() and not row.exp_avg_sq.any()
    assert torch.equal(table(mine).bank.step_counts, torch.zeros(1))


def test_each_rank_has_a_bank_of_exactly_its_size(rig: Callable[..., Rig]) -> None:
    """No row is padded to a larger rank: there are no elements between members that could drift."""
    mine = rig(slots=2)
    specs = {"four": adapter(rank=4), "eight": adapter(rank=8), "narrow": adapter(rank=8, targets=("q_proj", "o_proj"))}
    mine.reset([start(m, s, weights=mine.random_weights(m, s, seed=1)) for m, s in specs.items()])
    mine.step(examples(specs, each=2, vocab=96), rate=5e-3)
    banks = {t.bank.shape.digest: t.bank for t in mine.trainer._tables.values()}
    assert len(banks) == 3
    for member, spec in specs.items():
        shape = mine.shape(spec)
        assert banks[shape.digest].numel == shape.numel == mine.row(member).weights.numel()
        beyond = banks[shape.digest]._read[:, shape.numel :]
        assert not beyond.any() and beyond.shape[1] < 16
