"""Experts that the rollout chose are replayed; what cannot be replayed is refused with row, token and layer."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch

from allele.protocol.errors import InvalidRequest
from allele.protocol.losses import SupervisedLoss
from allele_trainer.model.batch import to_device
from allele_trainer.model.build import BaseModel, build
from allele_trainer.rl.packing import PAD, Sample, pack
from tests.trainer.parallel import cohort
from tests.trainer.random_base import write_base
from tests.trainer.trainer_parts import Example, Rig, adapter, start

LAYERS, K, EXPERTS = cohort.LAYERS, 2, 4


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("mixture") / "base"
    return build(write_base(folder, model="qwen3_moe", **cohort.SIZES["qwen3_moe"]))


def logprobs(model: BaseModel, *samples: Sample) -> torch.Tensor:
    packed = pack(samples)
    with torch.no_grad():
        return model.logprobs(to_device(packed, plan=None, device=model.device), torch.as_tensor(packed.targets))


def test_replayed_experts_change_the_logprobs_and_unknown_ones_do_not(mixture: BaseModel) -> None:
    prompt, completion = [5, 9, 2], [7, 1, 30]
    unknown = np.full((5, LAYERS, K), -1, np.int16)
    forced = np.tile(np.array([3, 0], np.int16), (5, LAYERS, 1))
    live = logprobs(mixture, Sample(0, prompt, completion))
    assert torch.equal(logprobs(mixture, Sample(0, prompt, completion, experts=unknown)), live)
    changed = logprobs(mixture, Sample(0, prompt, completion, experts=forced))
    assert (changed - live).abs().min() > 1e-4
    # Beside a sequence without experts of its own, each keeps its routing.
    both = logprobs(mixture, Sample(0, prompt, completion), Sample(0, prompt, completion, experts=forced))
    assert torch.equal(both, torch.cat([live, changed]))


def test_padding_has_different_experts_and_tokens_with_unknown_ones_do_not_count() -> None:
    experts = np.tile(np.array([1, 3], np.int16), (4, LAYERS, 1))
    experts[2, 1] = -1
    packed = pack([Sample(0, [1, 2], [3, 4, 5], experts=experts)])
    assert packed.routing is not None and packed.routing.shape == (LAYERS, PAD, K)
    assert (packed.routing[:, 4:] == np.arange(K)).all()
    assert packed.unknown.tolist() == [False, True, False]  # tokens 1, 2, 3 predict the three of the completion


def test_a_loss_leaves_out_tokens_whose_experts_are_not_known(mixture: BaseModel, tmp_path: pathlib.Path) -> None:
    prompt, completion = [5, 9, 2], [7, 1, 30]
    experts = np.tile(np.array([3, 0], np.int16), (5, LAYERS, 1))
    experts[3] = -1  # the token that predicts the second of the completion
    first, _, third = logprobs(mixture, Sample(0, prompt, completion, experts=experts)).tolist()
    rig = Rig(mixture, tmp_path / "store")
    rig.reset([start("m", adapter())])
    rig.admit("m")
    example = Example("m", prompt, completion, [-1.0] * 3, 1.0, experts.ravel().tolist())
    found = rig.forward_backward([example], losses=[SupervisedLoss()])
    assert found["m"].loss == pytest.approx(-(first + third) / 3)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([0, 1] * 8 + [2, 2] + [0, 1] * 1, r"row 0, experts of token 4 in layer 0: expected 2 different ids in 0\.\.3"),
        ([0, 1] * 9 + [0, 4], r"experts of token 4 in layer 1: .*found \[0, 4\]"),
        ([0, 1] * 9 + [-1, 1], r"experts of token 4 in layer 1: .* or all −1, found \[-1, 1\]"),
        ([0, 1] * 9, r"experts: expected .* = \(5, 2, 2\) ids, found '?18 ids"),
    ],
    ids=["one twice", "no such expert", "half unknown", "too few"],
)
def test_experts_that_cannot_be_replayed_are_refused(
    mixture: BaseModel, tmp_path: pathlib.Path, experts: list[int], message: str
) -> None:
    rig = Rig(mixture, tmp_path / "store")
    rig.reset([start("m", adapter())])
    rig.admit("m")
    with pytest.raises(InvalidRequest, match=message):
        rig.forward_backward([Example("m", [1, 2, 3], [4, 5, 6], [-1.0] * 3, 1.0, experts)])


def test_experts_for_a_model_without_any_are_refused(model: BaseModel, tmp_path: pathlib.Path) -> None:
    rig = Rig(model, tmp_path / "store")
    rig.reset([start("m", adapter())])
    rig.admit("m")
    with pytest.raises(InvalidRequest, match=r"row 0, experts: expected null, as the model has none"):
        rig.forward_backward([Example("m", [1], [2], [-1.0], 1.0, [0, 1, 0, 1])])


def test_a_member_with_adapters_on_experts_has_the_same_bits_alone_and_in_company(
    mixture: BaseModel, tmp_path: pathlib.Path
) -> None:
    """Tokens of an expert come from everybody: its padding and its groups must hide that."""
    members = ["a", "b", "c", "d"]
    found = {m: [e for e in _examples(members) if e.member == m] for m in members}
    rows = []
    for company in (["b"], members, ["d", "b"]):
        rig = Rig(mixture, tmp_path / "-".join(company), slots=8)
        spec = adapter(rank=4, alpha=8)
        rig.reset([start(m, spec, weights=rig.random_weights(m, spec, seed=ord(m))) for m in company])
        for _ in range(2):
            rig.step([e for m in company for e in found[m]], rate=1e-2)
        rows.append(rig.row("b"))
    for other in rows[1:]:
        for part in ("weights", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(rows[0], part), getattr(other, part)), part


def _examples(members: list[str]) -> list[Example]:
    rng = np.random.default_rng(3)
    return [
        Example(m, rng.integers(0, 97, 3).tolist(), rng.integers(0, 97, n).tolist(), [-4.0] * n, float(rng.normal()))
        for m in members
        for n in (1, 3, 9)
    ]
