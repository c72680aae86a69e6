"""Fixtures of the trainer's tests: one small base for all, one trainer for each."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch

from allele_trainer.model.build import BaseModel, build
from tests.trainer.random_base import write_base
from tests.trainer.trainer_parts import Rig

torch.set_num_threads(1)

EXAMPLE_BASE = pathlib.Path(__file__).parents[2] / "examples/preferences/base"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def model(base: pathlib.Path) -> BaseModel:
    return build(base)


@pytest.fixture(scope="session")
def example_model() -> BaseModel:
    """The base that ships with the example."""
    return build(EXAMPLE_BASE)


@pytest.fixture
def rig(model: BaseModel, tmp_path: pathlib.Path) -> Callable[..., Rig]:
    """Makes trainers on the shared base; all of a test share one store."""
    return lambda **limits: Rig(model, tmp_path / "store", **limits)
