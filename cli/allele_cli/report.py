"""`allele plot`: a population's report as one picture: reward curves, cross-evaluation, where the time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from allele.store.facts import Fact
from allele.store.population import PopulationStore
from allele_cli.access import NamespaceOption, StoreOption, open_population
from allele_cli.evaluate import Evaluation, read_evaluation
from allele_cli.failure import Failure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES = ("generate", "score", "train", "export", "save", "expose", "commit")
"""Order of a step; provenance has the seconds of each. expose is what a step waits for probes of the one before."""
SAMPLED_STEPS = 50
"""Steps whose provenance is read for the time split."""
SMOOTHING = 5
"""Steps of the moving average of a member's curve."""
LABELLED = 32
"""Members up to which the heat map names its rows."""


def plot(
    population: Annotated[str, typer.Argument(help="Name of the population.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("report.png"),
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Result of `allele eval`, for the heat map.")
    ] = None,
    namespace: NamespaceOption = "default",
    store: StoreOption = None,
) -> None:
    """Draw reward curves, cross-evaluation and time split of a population.

    Example: `allele plot preferences --eval out/demo/evaluation.json --out report.png --namespace allele-demo`
    """
    source = open_population(population, namespace=namespace, store=store)
    facts = [f for f in source.catalogue.facts() if f.kind == "Committed" and f.step]
    if not facts:
        raise Failure(f"{namespace}/{population}: expected committed steps, found none; is it training yet?")
    draw(
        facts,
        stages=stage_seconds(source, facts),
        out=out,
        evaluation=read_evaluation(evaluation) if evaluation else None,
        title=population,
    )
    print(out)


def stage_seconds(source: PopulationStore, facts: Sequence[Fact]) -> dict[str, float]:
    """Mean seconds of a step by stage, over at most SAMPLED_STEPS of the provenance documents that the facts name."""
    named = list(dict.fromkeys(f.provenance for f in facts if f.provenance))
    chosen = named[:: max(1, len(named) // SAMPLED_STEPS)]
    seen = [source.read_provenance(sha).seconds for sha in chosen]
    return {s: sum(row.get(s, 0.0) for row in seen) / len(seen) for s in STAGES}


def draw(
    facts: Iterable[Fact], *, stages: Mapping[str, float], out: Path, evaluation: Evaluation | None, title: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    facts = list(facts)
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.2), width_ratios=[1.3, 1.1, 0.8], layout="constrained")
    _curves(axes[0], facts, evaluation)
    _heat(axes[1], evaluation)
    _stages(axes[2], stages)
    figure.suptitle(f"{title}: {len({f.member for f in facts})} adapters on one base", fontsize=14)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _curves(axes: Axes, facts: list[Fact], evaluation: Evaluation | None) -> None:
    """Every member's reward by step, smoothed, and the mean of all."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for fact in facts:
        if fact.step is not None and "reward" in fact.metrics:
            curves[fact.member][fact.step] = fact.metrics["reward"]
    by_step: dict[int, list[float]] = defaultdict(list)
    for curve in curves.values():
        steps = sorted(curve)
        smooth = [
            sum(curve[s] for s in steps[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING)
            for i in range(len(steps))
        ]
        axes.plot(steps, smooth, linewidth=0.9, alpha=0.45)
        for step in steps:
            by_step[step].append(curve[step])
    steps = sorted(by_step)
    axes.plot(
        steps, [sum(by_step[s]) / len(by_step[s]) for s in steps], color="black", linewidth=2.4, label="mean of members"
    )
    if evaluation is not None:
        base = sum(evaluation.base.values()) / len(evaluation.base)
        axes.axhline(base, color="grey", linestyle="--", label=f"base, held out: {base:.2f}")
        after = evaluation.diagonal_mean
        axes.axhline(after, color="tab:green", linestyle=":", label=f"served, held out: {after:.2f}")
    axes.set(
        xlabel="optimizer step", ylabel="reward of training samples", ylim=(0, 1.02), title="Each member learns its own"
    )
    axes.legend(loc="lower right", frameon=False)


def _heat(axes: Axes, evaluation: Evaluation | None) -> None:
    """Row: whose adapter; column: whose reward."""
    axes.set_title("Adapter (row) under each member's reward (column)")
    if evaluation is None:
        axes.text(0.5, 0.5, "no evaluation given", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    image = axes.imshow(evaluation.cross, vmin=0, vmax=1, cmap="viridis")
    names = list(evaluation.members)
    if len(names) <= LABELLED:
        axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks([])
    axes.set_xlabel(f"own {evaluation.diagonal_mean:.2f}, others' {evaluation.off_diagonal_mean:.2f}")
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label="reward")


def _stages(axes: Axes, stages: Mapping[str, float]) -> None:
    bars = axes.barh(list(stages), list(stages.values()), color="tab:blue")
    axes.bar_label(bars, fmt="%.2f s", padding=3)
    axes.invert_yaxis()
    total = sum(stages.values())
    axes.set(title=f"A step: {total:.2f} s", xlabel="seconds", xlim=(0, max([*stages.values(), 0.01]) * 1.3))
