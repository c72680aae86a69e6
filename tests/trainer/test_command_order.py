"""Over HTTP: each command is executed once, and a driver that is late, early or of another time is told so by type."""

from __future__ import annotations

import pathlib
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from allele.protocol import commands as c
from allele.protocol.errors import (
    InvalidRequest,
    NotFound,
    ProtocolError,
    SequenceGap,
    StaleEpoch,
    Unavailable,
    UnknownIncarnation,
)
from allele.protocol.losses import PolicyLoss
from allele_trainer.server.app import Server
from allele_trainer.server.metrics import Metrics
from tests.trainer.trainer_parts import NAMESPACE, Rig, adapter, batch, same_rows, start
from tests.trainer.wire_client import FOUND, MEMBERS, Client


@pytest.fixture
async def client(rig: Callable[..., Rig]) -> AsyncIterator[Client]:
    mine = rig(slots=2)
    server = Server(mine.trainer, incarnation="first", base_digest="sha256:base", metrics=Metrics())
    async with TestServer(server.app()) as running, aiohttp.ClientSession() as session:
        yield Client(mine, str(running.make_url("")), session)


async def test_a_whole_step_over_http_equals_the_step_in_process(client: Client, rig: Callable[..., Rig]) -> None:
    await client.reset()
    await client.admit(1)
    losses = c.ForwardBackwardDone.model_validate_json(await client.forward_backward(2)).members
    updates = c.OptimStepDone.model_validate_json(await client.optim_step(3)).members
    exported = c.ExportDone.model_validate_json(
        await client.send("export", c.Export(header=client.header(4), members=MEMBERS))
    )
    saved = await client.send("save_state", c.SaveState(header=client.header(5), members=MEMBERS))
    await client.send("evict", c.Evict(header=client.header(6), members=("a",)))
    alone = rig(slots=2)
    alone.reset([start(m, adapter(), seed=i) for i, m in enumerate(MEMBERS)])
    assert alone.step(FOUND, rate=1e-2) == updates
    assert {m: loss.tokens for m, loss in losses.items()} == {
        m: sum(len(e.completion) for e in FOUND if e.member == m) for m in MEMBERS
    }
    for member in MEMBERS:
        assert same_rows(client.rig.row(member), alone.row(member))
        shape = client.rig.shape(adapter())
        packed = client.rig.store.read(exported.weights[member])
        assert shape.pack(alone.row(member).weights.numpy()) == packed
    assert set(c.SaveStateDone.model_validate_json(saved).states) == set(MEMBERS)
    info = c.TrainerInfo.model_validate_json(await client.get("/v1/info"))
    assert (info.incarnation, info.base_digest, info.slots) == ("first", "sha256:base", 2)
    assert (info.used, info.runs) == (1, {"run": 1})
    assert 'allele_trainer_commands_total{command="optim_step",outcome="ok"} 1.0' in await client.get("/metrics")


async def test_a_repeated_command_is_answered_and_not_executed(client: Client) -> None:
    await client.reset()
    await client.admit(1)
    assert await client.forward_backward(2) == await client.forward_backward(2)
    first = await client.optim_step(3)
    row = client.rig.row("a")
    assert await client.optim_step(3) == first
    assert same_rows(client.rig.row("a"), row) and row.step == 1


async def test_a_gradient_asked_for_twice_counts_once(client: Client) -> None:
    norms = []
    for epoch, times in ((1, 1), (2, 3)):
        await client.reset(epoch=epoch)
        await client.admit(1)
        for _ in range(times):
            await client.forward_backward(2)
        norms.append(c.OptimStepDone.model_validate_json(await client.optim_step(3)).members)
    assert norms[0] == norms[1]


async def test_another_command_under_an_answered_seq_is_refused(client: Client) -> None:
    await client.reset()
    await client.admit(1)
    with pytest.raises(InvalidRequest, match="seq: 1 of run run was another command"):
        await client.admit(1, "a")


@pytest.mark.parametrize("seq", [0, 2, 5])
async def test_a_seq_that_is_not_next_is_a_gap_and_nothing_is_executed(client: Client, seq: int) -> None:
    await client.reset()
    if seq == 0:
        await client.admit(1)
    with pytest.raises(SequenceGap, match=r"expected seq \d, found"):
        await client.admit(seq)
    await client.admit(2 if seq == 0 else 1)


async def test_an_older_driver_is_refused_after_a_newer_one_reset(client: Client) -> None:
    await client.reset(epoch=1)
    await client.reset(epoch=2)
    with pytest.raises(StaleEpoch, match="expected epoch 2 or later, found 1"):
        await client.admit(1, epoch=1)
    with pytest.raises(StaleEpoch):
        await client.reset(epoch=1)
    await client.admit(1, epoch=2)


async def test_an_epoch_that_no_reset_opened_is_refused(client: Client) -> None:
    await client.reset(epoch=1)
    with pytest.raises(SequenceGap, match="epoch 3 was not opened"):
        await client.admit(1, epoch=3)


async def test_another_incarnation_or_an_unknown_run_must_reset(client: Client) -> None:
    await client.reset()
    with pytest.raises(UnknownIncarnation, match="expected first, found of-yesterday"):
        await client.admit(1, incarnation="of-yesterday")
    with pytest.raises(UnknownIncarnation, match="run other: not known"):
        await client.admit(1, run="other")


async def test_a_refused_command_may_be_sent_again_corrected_under_its_seq(client: Client) -> None:
    await client.reset()
    with pytest.raises(NotFound, match="member nobody"):
        await client.admit(1, "nobody")
    await client.admit(1)


async def test_a_store_that_is_gone_refuses_the_export_and_a_retry_succeeds(
    client: Client, tmp_path: pathlib.Path
) -> None:
    await client.reset()
    await client.admit(1)
    folder = tmp_path / "store" / NAMESPACE
    if folder.exists():
        folder.rename(tmp_path / "was")
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the store's folder was")
    export = c.Export(header=client.header(2), members=MEMBERS)
    with pytest.raises(Unavailable, match="store"):
        await client.send("export", export)
    folder.unlink()
    assert set(c.ExportDone.model_validate_json(await client.send("export", export)).weights) == set(MEMBERS)


async def test_a_command_that_failed_half_way_closes_the_epoch(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    await client.reset()
    await client.admit(1)
    with monkeypatch.context() as patch:
        patch.setattr("allele_trainer.rl.passes.pack", lambda _: 1 / 0)
        with pytest.raises(ProtocolError, match="ZeroDivisionError"):
            await client.forward_backward(2)
    with pytest.raises(UnknownIncarnation, match="failed half-way"):
        await client.forward_backward(2)
    await client.reset()
    await client.admit(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member": "b"}, "row 1, member: expected one that was admitted"),
        ({"completion": [96]}, r"row 1, completion: expected at least one id, all in 0\.\.95"),
        ({"logprobs": []}, "row 1, logprobs: expected [0-9]+ values"),
        ({"prompt": [1] * 128}, "row 1, completion: expected at most 128 tokens"),
    ],
)
async def test_samples_that_cannot_be_trained_on_are_refused_by_row(
    client: Client, change: dict[str, object], message: str
) -> None:
    await client.reset()
    await client.admit(1, "a")
    found = [e for e in FOUND if e.member == "a"]
    found[1] = type(found[1])(**(vars(found[1]) | change))
    with pytest.raises(InvalidRequest, match=message):
        await client.post(
            "forward_backward", batch(c.ForwardBackward(header=client.header(2), losses=(PolicyLoss(),)), found)
        )
    with pytest.raises(InvalidRequest, match="expected members with a gradient"):
        await client.optim_step(2)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
async def test_a_learning_rate_that_would_spoil_rows_is_refused(client: Client, rate: float) -> None:
    await client.reset()
    await client.admit(1)
    await client.forward_backward(2)
    with pytest.raises(InvalidRequest, match="learning_rates: expected finite numbers"):
        await client.optim_step(3, rate)
    await client.optim_step(3)
    assert client.rig.row("a").weights.isfinite().all()


async def test_a_reset_without_members_gives_the_runs_slots_back(client: Client) -> None:
    await client.reset()
    await client.admit(1, "a", "b", "a")
    assert client.rig.trainer.used == 2
    await client.reset(members=())
    assert client.rig.trainer.used == 0


async def test_a_body_that_is_no_command_is_refused_by_field(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"header\.seq"):
        header = '{"run": "r", "epoch": 1, "incarnation": "i", "seq": "x"}'
        await client.post("admit", f'{{"header": {header}, "members": []}}')
    with pytest.raises(InvalidRequest, match="Arrow stream"):
        await client.post("forward_backward", b"no arrow")


async def test_a_loss_that_is_not_a_number_survives_the_wire(client: Client) -> None:
    await client.reset()
    await client.admit(1)
    found = [type(e)(**(vars(e) | {"advantage": float("nan")})) for e in FOUND]
    command = c.ForwardBackward(header=client.header(2), losses=(PolicyLoss(),))
    done = c.ForwardBackwardDone.model_validate_json(await client.post("forward_backward", batch(command, found)))
    assert all(loss.loss != loss.loss for loss in done.members.values())
