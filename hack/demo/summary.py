"""out/demo/: summary.json, evaluation.json and report.png, and the table that ends the demo."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

from allele.store.facts import Fact
from allele.store.index import Index
from allele.store.population import PopulationStore
from allele_cli.evaluate import Evaluation, evaluate_files
from allele_cli.output import Format, show
from allele_cli.report import draw, stage_seconds

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples/preferences"
OUT = ROOT / "out/demo"
POPULATION = "preferences"
FILES = [EXAMPLE / "04-population.yaml", EXAMPLE / "05-run.yaml"]
HELD_OUT_PROMPTS = 64


@dataclasses.dataclass
class Seconds:
    """Where the time of a demo went."""

    setup: float = 0
    cluster: float = 0
    start: float = 0
    """From applying the resources to the first commit; until `conclude`, to the end of training."""
    training: float = 0


def evaluate(endpoint: str, base_model: str) -> Evaluation:
    print(f"Evaluating the members and the base on {HELD_OUT_PROMPTS} held-out words through {endpoint}")
    result = asyncio.run(
        evaluate_files(
            FILES,
            endpoint=endpoint,
            base=EXAMPLE / "base",
            base_model=base_model,
            prompts=HELD_OUT_PROMPTS,
            temperature=1.0,
            seed=99,
        )
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "evaluation.json").write_text(result.model_dump_json(indent=2) + "\n")
    return result


def conclude(store: PopulationStore, result: Evaluation, *, seconds: Seconds, mode: str) -> None:
    """Write the files and print the table. `training` is taken from the catalogue: first to last commit of the run."""
    index = Index.load(store.catalogue)
    facts = list(store.catalogue.facts())
    committed = [f for f in facts if f.kind == "Committed"]
    times = [f.time for f in committed if f.step and f.time]
    seconds.training = (max(times) - min(times)).total_seconds()
    seconds.start = max(0.0, seconds.start - seconds.training)
    trained = [f for f in committed if f.step]
    stages = stage_seconds(store, trained)
    draw(trained, stages=stages, out=OUT / "report.png", evaluation=result, title=POPULATION)
    summary = {
        "mode": mode,
        "store": store.objects.url(""),
        "members": len(result.members),
        "steps": max(f.step or 0 for f in committed),
        "reward_first": {"mean": _mean(result.base), "per_member": result.base},
        "reward_last": {"mean": _mean(result.members), "per_member": result.members},
        "cross_evaluation": {
            "diagonal_mean": result.diagonal_mean,
            "off_diagonal_mean": result.off_diagonal_mean,
        },
        "revisions": {"committed": len(committed), "exposed": sum(f.kind == "Exposed" for f in facts)},
        "exposure_max_gap": exposure_max_gap(facts),
        "seconds": dataclasses.asdict(seconds) | {"step": stages},
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    rows = [
        {
            "member": name,
            "before": result.base[name],
            "after": reward,
            "revision": (exposed := index.exposed(name)) and exposed.revision,
        }
        for name, reward in result.members.items()
    ]
    print()
    show(rows, fmt=Format.table)
    print(
        f"\nHeld-out reward {_mean(result.base):.3f} before, {_mean(result.members):.3f} after "
        f"({sum(r > 0.85 for r in result.members.values())} of {len(result.members)} above 0.85); "
        f"under others' rewards {result.off_diagonal_mean:.3f}."
    )
    print(f"Training took {seconds.training:.0f} s. Plot: {OUT / 'report.png'}  Numbers: {OUT / 'summary.json'}")


def exposure_max_gap(facts: list[Fact]) -> float | None:
    """Largest |served − trained| log-probability of any exposed revision, as the gateways measured it."""
    return max((f.metrics["max_gap"] for f in facts if f.kind == "Exposed" and "max_gap" in f.metrics), default=None)


def _mean(rewards: dict[str, float]) -> float:
    return sum(rewards.values()) / len(rewards)
