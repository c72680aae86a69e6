"""How many slots fit: found by allocating them and making a real step, not by arithmetic alone.

Arithmetic gives the first guess: what one slot takes, what a step with the largest micro-batch took beside the rows,
what is free. Then that bank is allocated in full and stepped; while that fails, an eighth of the slots goes. On a GPU
failing is an out-of-memory error of the device. On a CPU memory is refused by nobody until the process is killed, so
there it is the process's own growth over its part: half of what is free, because rows that are in no slot need host
memory as well.

Several ranks have as many slots as the one with the least room. A step is theirs together, and one that runs out of
memory in the middle of it leaves the others waiting: so each first allocates what the step took beside the rows before,
and only when all could do they make it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import pathlib

import numpy as np
import torch

from allele.format import AdapterShape
from allele.format.shape import TARGETS
from allele.protocol.commands import OptimizerSpec
from allele.protocol.losses import PolicyLoss
from allele_trainer.bank.banks import Banks
from allele_trainer.bank.host import free_memory
from allele_trainer.bank.rows import Bank, bank_bytes
from allele_trainer.bank.shard import Shard
from allele_trainer.bank.start import initial
from allele_trainer.bank.step import Update, step
from allele_trainer.model.build import BaseModel
from allele_trainer.parallel import Ranks, local_ranks
from allele_trainer.rl.goals import Goal
from allele_trainer.rl.packing import Sample
from allele_trainer.rl.passes import train

MOST = 1024
"""More slots than that are only made when a number is given: a micro-batch holds about as many members."""

PART = {"cuda": 0.9, "cpu": 0.5}
"""Of the free memory, what rows and a step may take; the rest is for fragments, probes and host rows."""

_LENGTH = 256
"""Tokens of a sequence of the step."""


class NoRoom(Exception):
    """Not even one adapter fits beside the model."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    slots: int
    wave: int
    reason: str


def waves_of(slots: int, device: torch.device) -> int:
    """Members to train at a time. With CUDA the other half of the slots is for the next wave, which comes in meanwhile;
    without, copies take the time of the processor that computes, and there is nothing to win."""
    return max(1, slots // 2) if device.type == "cuda" else slots


def probe(model: BaseModel, *, max_rank: int, max_tokens: int) -> Capacity:
    """For adapters of the largest rank on all linear layers. Raises NoRoom."""
    shape = AdapterShape.from_model(model.config.raw, rank=max_rank, targets=TARGETS)
    meter = _Meter(model.device)
    limit = int(meter.free() * PART[model.device.type])
    one = _Try(model, shape, max_tokens=max_tokens)
    try:
        beside = one.run(1, meter)
    except torch.cuda.OutOfMemoryError as e:
        raise NoRoom(f"slots auto: expected room for one adapter of rank {max_rank}: {e}") from e
    each = one.bytes_of(2) - one.bytes_of(1)
    slots = _least(model.ranks, max(0, min(MOST, (limit - beside) // each)))
    while slots >= 1 and not one.fits(slots, meter, beside=beside, limit=limit):
        slots -= max(1, slots // 8)
    part = f"{PART[model.device.type]:.0%} of what was free" + (" on one of the ranks" if model.ranks.size > 1 else "")
    room = f"{_size(_least(model.ranks, limit))} ({part})"
    if slots < 1:
        raise NoRoom(
            f"slots auto: expected {_size(each)} for an adapter of rank {max_rank} and {_size(beside)} for a step of "
            f"{max_tokens} tokens, found {room}: lower --max-rank or --max-tokens"
        )
    wave = waves_of(slots, model.device)
    why = "the most that auto makes" if slots == MOST else "the most that fit"
    reason = (
        f"auto: {slots} slots, {why}: {_size(each)} each at rank {max_rank} and {_size(beside)} for a step of "
        f"{max_tokens} tokens, of {room}; {wave} at a time"
    )
    return Capacity(slots, wave, reason)


def _least(ranks: Ranks, value: int) -> int:
    """Of all ranks."""
    return min(int(data) for data in ranks.gather(str(value).encode()))


class _Try:
    """Banks of one shape, with a real forward, backward and step."""

    def __init__(self, model: BaseModel, shape: AdapterShape, *, max_tokens: int) -> None:
        self._model, self._tokens = model, max_tokens
        self._shard = Shard(shape, model.ranks.place)
        start = initial(shape, seed=0)
        self._row = dataclasses.replace(
            start,
            weights=self._shard.take(start.weights),
            exp_avg=self._shard.take(start.exp_avg),
            exp_avg_sq=self._shard.take(start.exp_avg_sq),
        )

    def bytes_of(self, slots: int) -> int:
        """Device memory of the rows of a bank."""
        wave = waves_of(slots, self._model.device)
        return bank_bytes(self._shard.numel, slots=slots, probes=0, gradients=wave, dtype=self._model.dtype)

    def fits(self, slots: int, meter: _Meter, *, beside: int, limit: int) -> bool:
        """Whether every rank has room for the rows, and for a step that takes about as much `beside` them."""
        ranks = self._model.ranks
        if ranks.size > 1 and not _least(ranks, int(self._allocates(slots, beside))):
            return False
        try:
            taken = self.run(slots, meter) + self.bytes_of(slots)
        except torch.cuda.OutOfMemoryError:
            if ranks.size > 1:
                raise  # the others are in the step: the process ends, and they with it
            torch.cuda.empty_cache()
            return False
        return bool(_least(ranks, int(taken <= limit)))

    def _allocates(self, slots: int, beside: int) -> bool:
        try:
            _ = self._bank(slots), torch.empty(beside, dtype=torch.uint8, device=self._model.device)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def run(self, slots: int, meter: _Meter) -> int:
        """Bytes that a step took beside the rows. Raises OutOfMemoryError on a device that has no more."""
        meter.begin()
        bank = self._bank(slots)
        for slot in range(slots):  # memory that was never written to is not there yet
            bank.store(slot, self._row, scale=1.0)
        wave = waves_of(slots, self._model.device)
        samples = self._samples(wave)
        train(self._model, Banks([bank]), samples)
        for slot in range(wave):
            bank.gradient_row(slot)
        step(bank, [Update(slot, 1e-3, OptimizerSpec()) for slot in range(wave)], ranks=self._model.ranks)
        taken = meter.peak()
        del bank
        gc.collect()
        return max(0, taken - self.bytes_of(slots))

    def _bank(self, slots: int) -> Bank:
        return Bank(
            self._shard,
            slots=slots,
            gradients=waves_of(slots, self._model.device),
            probes=0,
            device=self._model.device,
            dtype=self._model.dtype,
        )

    def _samples(self, wave: int) -> list[Sample]:
        """The largest micro-batch, over as many members as it can hold; all but one token of each are trained on."""
        length = min(_LENGTH, self._model.config.context, self._tokens + 1)
        count = max(1, self._tokens // (length - 1))
        members = [i * wave // count for i in range(count)]
        numbers = np.zeros(length - 1, np.float32)
        goal = Goal(PolicyLoss(), 1.0, rollout=numbers, advantages=numbers + 1)
        return [Sample(slot, [0], [0] * (length - 1), goal) for slot in members]


class _Meter:
    """Memory: what is free, and the most that was taken since `begin`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._before = 0

    def free(self) -> int:
        """For this rank: a device is its own, host memory that of all ranks on the machine."""
        return int(torch.cuda.mem_get_info()[0]) if self._cuda else free_memory() // local_ranks()

    def begin(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError, AttributeError):  # freed by the try before; other libraries keep less
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # where that is not allowed, the peak is that of the process's life
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        self._before = self._before or _process("VmRSS")

    def peak(self) -> int:
        if self._cuda:
            return int(torch.cuda.max_memory_allocated()) - self._before
        return max(0, _process("VmHWM") - self._before)


def _process(field: str) -> int:
    """Bytes of memory that this process has (VmRSS) or had at its peak (VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}"
