"""`allele run`: the same population and run files on this machine, without a cluster."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated

import typer

from allele.api.runtime import AdapterRuntimeSpec
from allele.store.address import FORMS
from allele_cli.display import Display
from allele_cli.failure import Failure
from allele_cli.local.session import Plan, default_runtime, session
from allele_cli.resources import load


def run(
    files: Annotated[list[Path], typer.Argument(help="YAML files with one AdapterPopulation and one RLRun.")],
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    store: Annotated[str | None, typer.Option(help=f"{FORMS}; default: a folder below --out.")] = None,
    code: Annotated[Path | None, typer.Option(help="Folder put on the driver's Python path: the run's code.")] = None,
    runtime: Annotated[
        Path | None, typer.Option(help="YAML file with an AdapterRuntime; its images are not used.")
    ] = None,
    manifests: Annotated[Path, typer.Option(help="Folder with <configMap>/<key> of manifests.")] = Path("manifests"),
    slots: Annotated[int, typer.Option(help="Adapters resident at once, in trainer and engine.")] = 16,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace in the store.")] = "default",
    out: Annotated[Path, typer.Option(help="Folder for logs and caches.")] = Path("out/local"),
    serve: Annotated[bool, typer.Option(help="Keep the endpoint up after training, until Ctrl-C.")] = False,
) -> None:
    """Train a population on this machine; running again resumes from the store.

    Example: `allele run population.yaml run.yaml --base base/ --code . --serve`
    """
    plan = make_plan(
        files,
        base=base,
        store=store,
        code=code,
        runtime=runtime,
        manifests=manifests,
        slots=slots,
        namespace=namespace,
        out=out,
    )

    async def go() -> None:
        with Display(f"{namespace}/{plan.run}") as display:
            async with session(plan, display) as running:
                await running.train()
                display.say(f"trained; store: {plan.store}")
                if serve:
                    display.say(f"serving at {running.endpoint}/v1 until Ctrl-C")
                    await asyncio.Event().wait()

    run_until_stopped(go)


def run_until_stopped(main: Callable[[], Coroutine[None, None, None]]) -> None:
    """asyncio.run that ends the processes on SIGTERM as on Ctrl-C. Raises Failure when it was stopped."""

    async def go() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await main()

    try:
        asyncio.run(go())
    except (KeyboardInterrupt, asyncio.CancelledError) as e:
        raise Failure("stopped; the same command resumes from the last commit") from e


def make_plan(
    files: list[Path],
    *,
    base: Path,
    store: str | None = None,
    code: Path | None = None,
    runtime: Path | None = None,
    manifests: Path = Path("manifests"),
    slots: int = 16,
    namespace: str = "default",
    out: Path = Path("out/local"),
) -> Plan:
    """Read and check the files. Raises Failure with the field to mend."""
    documents = load(files)
    population, population_spec = documents.population()
    name, run_spec = documents.run()
    if run_spec.population_ref != population:
        raise Failure(
            f"RLRun/{name}: populationRef: expected {population!r} as in the files, found {run_spec.population_ref!r}"
        )
    spec = default_runtime()
    if runtime is not None:
        spec = load([runtime]).spec("AdapterRuntime", AdapterRuntimeSpec)[1]
        spec = spec.model_copy(update={"environment": None})
    return Plan(
        namespace=namespace,
        population=population,
        population_spec=population_spec,
        run=name,
        run_spec=run_spec,
        runtime=spec,
        store=store or f"file://{(out / 'store').resolve()}",
        base=base,
        code=code.resolve() if code else None,
        manifests=manifests,
        slots=slots,
        out=out.resolve(),
    )
