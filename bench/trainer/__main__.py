"""Time one optimizer step of N adapters, ours and the rivals', and write the ratios.

Processor time of the whole process, best of several rounds, contenders taking turns: other work on the machine then
costs both sides the same, or nothing.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
import transformers

from allele.format import AdapterShape
from allele.protocol import commands as c
from allele_trainer.bank.rows import Bank
from allele_trainer.bank.shard import Shard
from allele_trainer.bank.step import Update, step
from allele_trainer.model.build import BaseModel, build
from allele_trainer.parallel import Ranks, initialise
from bench.report import Report
from bench.trainer.ours import MAX_TOKENS, Ours
from bench.trainer.rivals import Contender, Loop, PerAdapter, Sequential, Stacking, Swapping, TooMany
from bench.trainer.workload import CLIP, RANK, RATE, TARGETS, Workload, write_base

MEMBERS = (1, 4, 16, 64, 256, 1024)
TOKENS = (8, 32, 128, 512)
SMALL = ("h64", "h128", "h256")
RIVALS = (Sequential, Swapping, Loop, Stacking)
ENOUGH = 5.0
"""Seconds of all contenders together after which no round is added to those asked for."""

EXAMPLE = """example:
  python -m bench.trainer --models h64 --members 64,256 --tokens 8,32 --rounds 5"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.trainer", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--models", type=names, default=SMALL, help="by width (default: h64,h128,h256)")
    parser.add_argument("--members", type=numbers, default=MEMBERS, help="adapters (default: 1,4,16,64,256,1024)")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="tokens per adapter (default: 8,32,128,512)")
    parser.add_argument(
        "--most-tokens", type=int, default=16384, help="leave out steps with more tokens in all (default: 16384)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="steps of each contender, at least; the best counts (default: 3)"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"), help="folder of the JSON")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if min(args.members) * min(args.tokens) > args.most_tokens:
        parser.error(
            f"--most-tokens: expected at least {min(args.members) * min(args.tokens)}, found {args.most_tokens}"
        )
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    settings = {"rank": RANK, "targets": TARGETS, "layers": 2, "max_tokens": MAX_TOKENS, "rounds": args.rounds}
    report = Report("trainer", settings | {"device": "cpu", "dtype": "float32", "time": "processor seconds of a step"})
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            base = write_base(pathlib.Path(folder) / name, model=name)
            ranks = initialise()
            model = build(base, ranks)
            for work in _workloads(args, name):
                _compare(report, model, work, base=base, rounds=args.rounds)
            _optimizer(report, model, ranks, name=name, rounds=args.rounds)
    report.finish(args.out)


def _workloads(args: argparse.Namespace, model: str) -> Iterator[Workload]:
    for members in args.members:
        for tokens in args.tokens:
            if members * tokens <= args.most_tokens:
                yield Workload(model, members, tokens)


def _compare(report: Report, model: BaseModel, work: Workload, *, base: pathlib.Path, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as store:
        ours = Ours(model, work, store=pathlib.Path(store))
        contenders: list[Contender] = [ours]
        for rival in RIVALS:
            try:
                contenders.append(rival(base, work))
            except TooMany:
                continue
        best = _best(contenders, rounds)
        ours.close()
    row: dict[str, object] = {"model": work.model, "N": work.members, "tokens": work.tokens, "mode": ours.mode}
    row["allele ms"] = best[ours.name] * 1e3
    for rival in RIVALS:
        found = best.get(rival.name)
        row[f"{rival.name} ms"] = None if found is None else found * 1e3
        if found is not None:
            report.ratios[f"{work.key} vs {rival.name}"] = found / best[ours.name]
    row["vs sequential"] = best[Sequential.name] / best[ours.name]
    report.rows.append(row)
    print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), file=sys.stderr)
    gc.collect()


def _best(contenders: list[Contender], rounds: int) -> dict[str, float]:
    """Processor seconds of a step of all members; the first round of each only warms up. Short steps take more rounds:
    the best of a few is chance."""
    best = dict.fromkeys((each.name for each in contenders), float("inf"))
    number, spent = 0, 0.0
    while number <= rounds or spent < ENOUGH:
        for each in contenders:
            seconds = _seconds(each.ready())
            spent += seconds
            if number:
                best[each.name] = min(best[each.name], seconds * each.scale)
        number += 1
    return best


def _seconds(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _optimizer(report: Report, model: BaseModel, ranks: Ranks, *, name: str, rounds: int, members: int = 256) -> None:
    """The step alone: clip, AdamW and dropping of the gradients."""
    shape = AdapterShape.from_model(model.config.raw, rank=RANK, targets=TARGETS)
    bank = Bank(Shard(shape), slots=members, probes=1, device=torch.device("cpu"), dtype=torch.float32)
    rule = c.OptimizerSpec(clip=CLIP)
    updates = [Update(slot, RATE, rule) for slot in range(members)]
    parameters = [[torch.nn.Parameter(torch.randn(t.shape)) for t in shape.tensors] for _ in range(members)]
    rival = PerAdapter(parameters)
    best = {"allele": float("inf"), "rival": float("inf")}
    for _ in range(rounds + 1):
        for slot in range(members):
            bank.gradient_row(slot)
            bank.gradient(slot).normal_()
        best["allele"] = min(best["allele"], _seconds(lambda: (step(bank, updates, ranks=ranks), None)[1]))
        for some in parameters:
            for p in some:
                p.grad = torch.randn_like(p)
        best["rival"] = min(best["rival"], _seconds(rival.step))
    report.ratios[f"optimizer {name} N{members} vs AdamW per adapter"] = best["rival"] / best["allele"]


if __name__ == "__main__":
    main()
