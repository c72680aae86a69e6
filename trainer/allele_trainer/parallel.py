"""Ranks of a trainer: its layout over processes, and the few collectives that the bank and the server need.

A rank holds a tensor-parallel slice of a range of layers and a range of experts; data ranks hold the same and split the
samples. Megatron orders ranks tensor, then data, then pipeline, and experts over the tensor × data ranks of a stage.
Commands, digests and exported bytes travel over gloo in a group of their own: it may wait for days, which the groups of
the model may not. With one process every collective is the identity and costs nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from allele_trainer.bank.shard import Place, Shard
from allele_trainer.model import cpu

_PATIENCE = datetime.timedelta(days=3650)
"""A trainer waits for its next command as long as it takes; torchrun ends it when another rank is gone."""

_CHUNK = 1 << 24
"""Elements of gradient that one all-reduce copies out of the rows at a time (64 MiB)."""


class UnsupportedLayout(Exception):
    """The processes there are, or the model, do not fit the layout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """tp × pp × dp processes; ep spreads experts over the tp × dp ranks of a stage and takes no process of its own."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    """Norms and residuals on 1/tp of the tokens each; experts under tp > 1 need it."""
    recompute: bool = False
    """Keep only the input of each layer and run it again in the backward."""

    def __post_init__(self) -> None:
        small = {n: getattr(self, n) for n in ("tp", "pp", "ep", "dp") if getattr(self, n) < 1}
        if small:
            raise UnsupportedLayout(f"layout: expected sizes of at least 1, found {small}")
        if self.tp * self.dp % self.ep:
            raise UnsupportedLayout(
                f"ep: expected a divisor of tp × dp = {self.tp * self.dp} (experts are spread over these ranks), "
                f"found {self.ep}"
            )

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.dp

    def place(self, rank: int) -> Place:
        """What `rank` holds."""
        within = rank % (self.tp * self.dp)
        return Place(
            tp=self.tp,
            tp_rank=rank % self.tp,
            pp=self.pp,
            pp_rank=rank // (self.tp * self.dp),
            ep=self.ep,
            ep_rank=within % self.ep,
        )

    def data_rank(self, rank: int) -> int:
        return rank // self.tp % self.dp


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among the others. Every method is collective: all ranks call it in the same order."""

    layout: Layout
    rank: int
    device: torch.device
    control: dist.ProcessGroup | None
    """None when there is one process."""

    @property
    def size(self) -> int:
        return self.layout.processes

    @property
    def place(self) -> Place:
        return self.layout.place(self.rank)

    @property
    def data_rank(self) -> int:
        return self.layout.data_rank(self.rank)

    @property
    def sequence_parallel(self) -> bool:
        return self.layout.sequence_parallel and self.layout.tp > 1

    def sum_gradients(self, gradient: Tensor, shard: Shard) -> None:
        """Add up, in place, what each rank has of the gradient rows `[n, P_local]`: once, right before a step.

        Over data ranks every element (experts over those ranks that hold the same experts). With sequence parallelism
        a matrix that is whole on each tensor rank saw only that rank's tokens: it is summed over tensor ranks too.
        """
        if self.sequence_parallel:
            _sum_pieces(gradient, shard.replicated, parallel_state.get_tensor_model_parallel_group())
        if self.layout.dp > 1:
            _sum_pieces(gradient, shard.dense, parallel_state.get_data_parallel_group())
        if self.layout.tp * self.layout.dp > self.layout.ep and shard.experts:
            _sum_pieces(gradient, shard.experts, parallel_state.get_expert_data_parallel_group())

    def sum_squares(self, squares: Tensor, expert_squares: Tensor | None = None) -> Tensor:
        """`[n]` sums of squares over `shard.counted` and over `shard.experts` of each rank → of the whole rows.

        Dense pieces are added over tensor × pipeline ranks, experts over expert × pipeline ranks: never over ranks that
        hold a copy.
        """
        total = squares
        if self.layout.tp * self.layout.pp > 1:
            total = total.clone()
            dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        if expert_squares is not None:
            if self.layout.ep * self.layout.pp > 1:
                expert_squares = expert_squares.clone()
                dist.all_reduce(expert_squares, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
            total = total + expert_squares
        return total

    def broadcast(self, data: bytes | None) -> bytes:
        """Bytes of rank 0, on every rank; others give None."""
        if self.size == 1:
            assert data is not None
            return data
        size = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(size, src=0, group=self.control)
        body = _bytes(data) if data is not None else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(body, src=0, group=self.control)
        return data if data is not None else body.numpy().tobytes()

    def gather(self, data: bytes) -> list[bytes]:
        """Bytes of every rank in order, on every rank."""
        if self.size == 1:
            return [data]
        found = self.exchange([_bytes(data)] * self.size)
        return [t.numpy().tobytes() for t in found]

    def exchange(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """pieces[r], flat in host memory and of one dtype, goes to rank r; gives what each rank sent here."""
        if self.size == 1:
            return list(pieces)
        sizes = torch.tensor([p.numel() for p in pieces])
        wanted = torch.empty_like(sizes)
        dist.all_to_all_single(wanted, sizes, group=self.control)
        counts = wanted.tolist()
        received = pieces[0].new_empty(sum(counts))
        dist.all_to_all_single(received, torch.cat(list(pieces)), counts, sizes.tolist(), group=self.control)
        return list(received.split(counts))


def local_ranks() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def initialise(layout: Layout | None = None) -> Ranks:
    """Join the other ranks (torchrun's environment) or be the only one; again, with the same sizes, it changes nothing.

    Raises UnsupportedLayout when there are not as many processes as the layout needs, or they were started with other
    sizes.
    """
    layout = layout or Layout()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != layout.processes:
        raise UnsupportedLayout(
            f"tp × pp × dp = {layout.tp} × {layout.pp} × {layout.dp}: expected {layout.processes} processes "
            f"(torchrun --nnodes × --nproc-per-node), found {processes}"
        )
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        cpu.install()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    if not dist.is_initialized():
        _join("gloo" if on_cpu else "nccl", processes)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
        )
        model_parallel_cuda_manual_seed(1, inference_rng_tracker=on_cpu)
    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
        # With two stages the neighbours of a stage are one rank; Megatron mixes up what they send, without an error.
        raise UnsupportedLayout("pipeline: expected one range of layers per rank, found interleaved (virtual) stages")
    wanted = layout.tp, layout.pp, layout.ep
    if found != wanted:
        raise UnsupportedLayout(f"tp, pp, ep: expected {found}, as this process was started with, found {wanted}")
    return Ranks(layout, dist.get_rank(), device, _control_group(processes))


def _join(backend: str, processes: int) -> None:
    if processes > 1:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # After a restart in place torchrun hands out the store of the processes before, with their addresses in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        fresh = dist.PrefixStore(f"start-{attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=size)
    else:
        # A store in this process: one rank needs no port.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _control_group(processes: int) -> dist.ProcessGroup | None:
    if processes == 1:
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return group


def _sum_pieces(rows: Tensor, pieces: Sequence[slice], group: dist.ProcessGroup) -> None:
    """All-reduce some columns of `[n, P]` in place, through a copy of bounded size."""
    width = sum(p.stop - p.start for p in pieces)
    if not width:
        return
    for part in rows.split(math.ceil(_CHUNK / width)):
        copy = torch.cat([part[:, p] for p in pieces], dim=1)
        dist.all_reduce(copy, group=group)
        at = 0
        for p in pieces:
            part[:, p] = copy[:, at : at + p.stop - p.start]
            at += p.stop - p.start


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
