"""On a real trainer and engine: members that start from the base are served as they were trained, and say so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import yaml

from tests.driver.driver_parts import EXAMPLE, DrivenRun

ADAPTERS: dict[str, dict[str, Any]] = {
    "pissa": {"rank": 4, "alpha": 4, "init": {"kind": "PiSSA", "baseMode": "Rank2r"}},
    "mica": {"rank": 8, "init": {"kind": "MiCA"}},
    "stabilised": {"rank": 8, "alpha": 4, "scaling": "RankStabilised"},
    "fixed": {"rank": 8, "alpha": 1, "scaling": "Fixed"},
}


def test_every_start_and_scale_is_served_as_it_was_trained(run: Callable[..., DrivenRun]) -> None:
    part = yaml.safe_load((EXAMPLE / "05-run.yaml").read_text())["spec"]["groups"][0]
    population = yaml.safe_load((EXAMPLE / "04-population.yaml").read_text())["spec"]["groups"][0]
    groups = [
        copy.deepcopy(population) | {"name": n, "members": {"count": 1}, "adapter": a} for n, a in ADAPTERS.items()
    ]
    parts = [copy.deepcopy(part) | {"select": {"group": name}} for name in ADAPTERS]
    started = run("starts", members=1, steps=3, populationSpec={"groups": groups}, groups=parts)
    driver = started.start()
    assert driver.wait() == 0, driver.output()[-3000:]
    committed = started.committed()
    exposed = {(f.member, f.revision) for f in started.facts() if f.kind == "Exposed"}
    for name, adapter in ADAPTERS.items():
        _first, *later = committed[f"{name}-0000"]
        assert later, f"{name} was never trained"
        assert {(f.member, f.revision) for f in later} <= exposed
        assert all(f.metrics["logprob_gap"] < 1e-3 for f in later)
        made = started.population.read_provenance(later[-1].provenance or "").shapes[name]
        init = adapter.get("init", {})
        assert (made.init, made.base_mode) == (init.get("kind", "Standard"), init.get("baseMode", "Untouched"))
        assert bool(made.factors) is bool(init)
        assert made.residual_of == ""
