"""`make demo MODE=local`: the same files learn without a cluster."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import run_demo
from tests.e2e.test_demo import assert_learned


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_population_learns_without_a_cluster() -> None:
    demo = run_demo("local")
    assert demo.summary["mode"] == "local"
    assert_learned(demo.summary)
    assert demo.summary["seconds"]["training"] <= 300
