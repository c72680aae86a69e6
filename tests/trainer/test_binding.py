"""Every tensor of an adapter has a linear that reads it, or training does not begin."""

from __future__ import annotations

import pathlib

import pytest

from allele_trainer.bank.shard import Shard
from allele_trainer.model.build import BaseModel, build
from allele_trainer.model.run import Unbound
from tests.trainer.random_base import write_base
from tests.trainer.trainer_parts import ALL, Rig, adapter, start


def test_a_linear_without_its_wrapper_is_named_before_any_training(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = build(base)
    attention = model.gpt.decoder.layers[1].self_attention
    attention.linear_proj = attention.linear_proj.inner
    rig = Rig(model, tmp_path / "store")
    rig.reset([start("queries", adapter(targets=("q_proj",)))])
    with pytest.raises(Unbound, match=r"q_proj, k_proj.*: expected a linear .* each of 8 .*\[\(1, 'linear_proj'\)\]"):
        rig.reset([start("all", adapter())])


def test_a_model_has_as_many_linears_as_an_adapter_on_all_targets_needs(
    model: BaseModel, tmp_path: pathlib.Path
) -> None:
    sizes = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
    mixture = build(write_base(tmp_path / "base", model="qwen3_moe", **sizes))
    for each, linears in ((model, 2 * 4), (mixture, 2 * (2 + 4 * 2))):
        shape = Rig(each, tmp_path / f"{linears}").shape(adapter(targets=ALL))
        each.bind(Shard(shape))
        assert len(each.sites) == linears
