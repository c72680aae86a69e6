"""Start a trainer: build the frozen model once, then execute the commands of drivers."""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import signal

import torch
from aiohttp import web
from ulid import ULID

from allele.store import Objects, PopulationStore, bases
from allele.store.address import FORMS
from allele_trainer.bank.host import free_memory
from allele_trainer.initialisation.initialiser import Initialiser
from allele_trainer.model.build import BaseModel, build
from allele_trainer.parallel import Layout, initialise, local_ranks
from allele_trainer.server import logs
from allele_trainer.server.app import Server
from allele_trainer.server.capacity import Capacity, probe, waves_of
from allele_trainer.server.metrics import Metrics
from allele_trainer.server.recent import Recent
from allele_trainer.server.store import RunFactors, RunStore
from allele_trainer.server.trainer import Limits, Trainer

log = logging.getLogger(__name__)

AUTO = "auto"

EXAMPLE = """example:
  python -m allele_trainer --base examples/preferences/base --base-digest sha256:... \\
      --store file:///tmp/store --slots 16 --max-rank 8 --listen 127.0.0.1:7070

The store's credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...). On a machine without CUDA
one thread is used unless OMP_NUM_THREADS says otherwise. A model that is too large for one rank:
  torchrun --nproc-per-node 2 -m allele_trainer --tp 2 --sequence-parallel ..."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="allele_trainer", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=pathlib.Path, required=True, help="folder of the base model (Hugging Face files)"
    )
    parser.add_argument(
        "--base-digest", required=True, help="digest of the base's files (`allele base fetch`): another base is refused"
    )
    parser.add_argument("--store", required=True, help=FORMS)
    parser.add_argument(
        "--slots",
        type=_slots,
        default=16,
        help="adapters of one shape in the bank at a time; auto: as many as a probe of the memory finds (default: 16)",
    )
    parser.add_argument(
        "--wave", type=int, help="members with a gradient at a time (default: as many as slots; with CUDA half of them)"
    )
    parser.add_argument(
        "--host-memory",
        type=int,
        help="bytes for rows that are in no slot (default: half of what is free at the start)",
    )
    parser.add_argument(
        "--recent-memory",
        type=int,
        default=1 << 30,
        help="bytes of the last exports that are kept for gateways, on rank 0 (default: 1 GiB)",
    )
    parser.add_argument("--max-rank", type=int, default=8, help="largest rank of an adapter (default: 8)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        help="input tokens per micro-batch: bounds activation memory (default: 4096)",
    )
    for axis, what in (
        ("tp", "linears split over so many ranks"),
        ("pp", "layers split over so many stages"),
        ("ep", "experts split over so many of the tp × dp ranks"),
        ("dp", "sequences split over so many copies"),
    ):
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"{what} (default: 1); torchrun starts the ranks")
    parser.add_argument(
        "--sequence-parallel", action="store_true", help="with --tp: norms on a part of the tokens each"
    )
    parser.add_argument("--recompute", action="store_true", help="keep layers' inputs only and run them again")
    parser.add_argument("--image", default="", help="image that this runs in, for the provenance (default: none)")
    parser.add_argument(
        "--listen", default="127.0.0.1:7070", help="address:port; port 0 takes a free one (default: 127.0.0.1:7070)"
    )
    return parser


def limits_of(args: argparse.Namespace, model: BaseModel) -> Limits:
    """Slots as given or as found, the same on every rank; raises NoRoom when none fit."""
    if args.slots == AUTO:
        found = probe(model, max_rank=args.max_rank, max_tokens=args.max_tokens)
        log.info("slots", extra={"slots": found.slots, "wave": found.wave, "reason": found.reason})
    else:
        found = Capacity(args.slots, waves_of(args.slots, model.device), "given")
    host_memory = args.host_memory or free_memory() // 2 // local_ranks()
    return Limits(
        slots=found.slots,
        wave=min(args.wave or found.wave, found.slots),
        max_rank=args.max_rank,
        max_tokens=args.max_tokens,
        host_memory=int(model.ranks.broadcast(str(host_memory).encode() if model.ranks.rank == 0 else None)),
        reason=found.reason,
    )


def _slots(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected auto or a number of at least 1, found {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    logs.configure()
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # the ranks of a node see one folder
        bases.check(args.base, args.base_digest)
    layout = Layout(
        tp=args.tp,
        pp=args.pp,
        ep=args.ep,
        dp=args.dp,
        sequence_parallel=args.sequence_parallel,
        recompute=args.recompute,
    )
    model = build(args.base, initialise(layout))
    limits = limits_of(args, model)

    def open_store(namespace: str, population: str) -> RunStore:
        return RunStore(PopulationStore.open(args.store, namespace=namespace, population=population))

    initialiser = Initialiser(
        args.base,
        digest=args.base_digest,
        store=RunFactors(Objects.open(args.store), args.base_digest),
        ranks=model.ranks,
    )
    trainer = Trainer(
        model,
        open_store=open_store,
        limits=limits,
        initialiser=initialiser,
        recent=Recent(args.recent_memory if model.ranks.rank == 0 else 0),  # the only rank that is asked
        image=args.image,
    )
    incarnation = model.ranks.broadcast(str(ULID()).encode() if model.ranks.rank == 0 else None).decode()
    server = Server(trainer, incarnation=incarnation, base_digest=args.base_digest, metrics=Metrics())
    host, _, port = args.listen.rpartition(":")
    log.info("ready", extra={"incarnation": incarnation, "device": str(model.device), "listen": args.listen})
    if model.ranks.rank == 0:
        web.run_app(server.app(), host=host, port=int(port), access_log=None, print=None)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 gets one too, and ends the loop when it has answered
        server.follow()


if __name__ == "__main__":
    main()
