"""`make bench-trainer DEVICE=cuda`: Qwen3 shapes on an accelerator, ours against PEFT one by one and stacking.

Tokens per second of whole steps; what a slot takes; and a population with more members than slots, with its time split
into computing, paging (what `admit` waits for) and exporting. Wall time: the machine is taken to be ours.

Tokens of a step are the same for every number of members, so that rows differ in how they are divided, not in size.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import torch
import transformers

from allele_trainer.model.build import BaseModel, build
from allele_trainer.parallel import initialise
from bench.report import Report
from bench.trainer.ours import Ours
from bench.trainer.rivals import Contender, Sequential, Stacking, TooMany
from bench.trainer.workload import MODELS, RANK, TARGETS, Workload, write_base

EXAMPLE = """example:
  python -m bench.trainer.device --models 0.6B --members 8,64,256 --step-tokens 65536"""

LONGEST = 256


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.trainer.device",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    def models(text: str) -> list[str]:
        unknown = set(text.split(",")) - MODELS.keys()
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(MODELS)}, found {', '.join(unknown)}")
        return text.split(",")

    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the code (default: cuda)")
    parser.add_argument("--models", type=models, default=["0.6B", "4B"], help="shapes (default: 0.6B,4B)")
    parser.add_argument("--members", type=numbers, default=[1, 8, 64, 256], help="adapters (default: 1,8,64,256)")
    parser.add_argument("--step-tokens", type=int, default=65536, help="tokens of a step (default: 65536)")
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens of a micro-batch (default: 16384)")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each contender; the best counts (default: 3)")
    parser.add_argument("--logical", type=int, default=4096, help="members of the paged population (default: 4096)")
    parser.add_argument("--slots", type=int, default=512, help="slots that they share (default: 512)")
    parser.add_argument("--paged-model", default="0.6B", help="model of the paged population (default: 0.6B)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"), help="folder of the JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: expected a CUDA device, found none: run it where one is")
    transformers.utils.logging.disable_progress_bar()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    report = Report("trainer-device", settings | {"accelerator": name, "rank": RANK, "targets": TARGETS})
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            base = write_base(pathlib.Path(folder) / model, model=model, device=args.device)
            ours = build(base, initialise())
            for members in args.members:
                _compare(report, args, ours, base, _workload(args, model, members))
            if model == args.paged_model:
                _paged(report, args, ours, _workload(args, model, args.logical))
            del ours
            _free()
    report.finish(args.out)


def _workload(args: argparse.Namespace, model: str, members: int) -> Workload:
    tokens = max(8, args.step_tokens // members)
    return Workload(model, members, tokens, longest=min(LONGEST, tokens), device=args.device)


def _compare(report: Report, args: argparse.Namespace, model: BaseModel, base: pathlib.Path, work: Workload) -> None:
    total = work.members * work.tokens
    with tempfile.TemporaryDirectory() as store:
        ours = Ours(model, work, store=pathlib.Path(store), max_tokens=args.max_tokens)
        best = _best(ours, args.rounds)
        row: dict[str, object] = {"model": work.model, "N": work.members, "tokens": work.tokens}
        row |= {"allele tok/s": total / best, "MB/slot": ours.trainer.bank_bytes / work.members / 1e6}
        ours.close()
        del ours
    _free()
    for rival in (Sequential, Stacking):
        try:
            found = rival(base, work)
            seconds = _best(found, args.rounds) * found.scale
            del found
        except (TooMany, torch.cuda.OutOfMemoryError) as e:
            row[f"{rival.name} tok/s"] = None if isinstance(e, TooMany) else "out of memory"
        else:
            row[f"{rival.name} tok/s"] = total / seconds
            report.ratios[f"{work.key} vs {rival.name}"] = seconds / best
        _free()
    report.rows.append(row)
    print(row, file=sys.stderr)


def _paged(report: Report, args: argparse.Namespace, model: BaseModel, work: Workload) -> None:
    """More members than slots: a step of all of them, in waves."""
    with tempfile.TemporaryDirectory() as store:
        ours = Ours(model, work, store=pathlib.Path(store), slots=args.slots, max_tokens=args.max_tokens)
        ours.step()
        ours.seconds.clear()
        ours.step()
        ours.export()
        seconds = ours.seconds
        report.rows.append(
            {
                "model": work.model,
                "N": work.members,
                "tokens": work.tokens,
                "allele tok/s": work.members * work.tokens / sum(v for k, v in seconds.items() if k != "export"),
                "MB/slot": ours.trainer.bank_bytes / args.slots / 1e6,
                "slots": args.slots,
                **{f"{k} s": v for k, v in seconds.items()},
            }
        )
        print(report.rows[-1], file=sys.stderr)
        ours.close()


def _best(contender: Contender, rounds: int) -> float:
    """Seconds; the first round only warms up."""
    best = float("inf")
    for number in range(rounds + 1):
        step = contender.ready()
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began) if number else best
    return best


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
