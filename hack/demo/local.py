"""The demo without a cluster: the same files, the same processes, over a store in a folder."""

from __future__ import annotations

import asyncio
import time

from allele.store.population import PopulationStore
from allele_cli.display import Display
from allele_cli.local import make_plan, run_until_stopped
from allele_cli.local.session import session
from hack.demo.summary import EXAMPLE, FILES, POPULATION, ROOT, Seconds, conclude, evaluate


def demo(*, seconds: Seconds) -> None:
    plan = make_plan(
        FILES,
        base=EXAMPLE / "base",
        code=EXAMPLE,
        runtime=EXAMPLE / "02-runtime.yaml",
        out=ROOT / "out/local",
    )
    print("· allele run examples/preferences/04-population.yaml examples/preferences/05-run.yaml")
    print(f"  logs in {plan.out / 'logs'}, store {plan.store}")

    async def go() -> None:
        started = time.monotonic()
        with Display(plan.run) as display:
            async with session(plan, display) as running:
                await running.train()
                seconds.start = time.monotonic() - started
                result = await asyncio.to_thread(evaluate, running.endpoint, plan.pool)
        store = PopulationStore.open(plan.store, namespace=plan.namespace, population=POPULATION)
        conclude(store, result, seconds=seconds, mode="local")

    run_until_stopped(go)
    member = f"{POPULATION}/taste-0003"
    print(
        f"""
Try next:
  export PATH={ROOT / ".venv/bin"}:$PATH ALLELE_STORE={plan.store}
  allele lineage {member}
  allele export {member} --to out/adapter
  allele run {FILES[0].relative_to(ROOT)} {FILES[1].relative_to(ROOT)} --base examples/preferences/base \\
    --code examples/preferences --runtime examples/preferences/02-runtime.yaml --serve
"""
    )
