"""The factors that an adapter starts from are those of the whole SVD or QR, and PEFT's where it has them."""

from __future__ import annotations

from typing import Any, get_args

import peft
import pytest
import torch
from torch import Tensor, nn

from allele.protocol.errors import InvalidRequest
from allele.protocol.initialisation import InitKind
from allele_trainer.initialisation.decompositions import decompose
from allele_trainer.initialisation.factors import DECOMPOSITIONS, factors

KINDS: list[Any] = [k for k in get_args(InitKind) if k != "Standard"]
SIZES = [(24, 24), (16, 40), (40, 16)]
RANK, SCALE = 4, 2.5


def weight(out: int, into: int, seed: int = 0) -> Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed))


def reference(w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """From whole decompositions, as the papers write them; every vector as LAPACK signs it."""
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    if kind == "OLoRA":
        q, r = torch.linalg.qr(w.double())
        return q[:, :RANK], r[:RANK]
    root = (s / SCALE).sqrt().diag()
    if kind == "PiSSA":
        return u[:, :RANK] @ root[:RANK, :RANK], root[:RANK, :RANK] @ vt[:RANK]
    if kind == "MiLoRA":
        return u[:, -RANK:] @ root[-RANK:, -RANK:], root[-RANK:, -RANK:] @ vt[-RANK:]
    return u[:, -RANK:], vt[-RANK:] * (kind != "MiCA")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_factors_are_those_of_the_whole_decomposition_with_signs_of_their_own(
    kind: Any, sizes: tuple[int, int]
) -> None:
    w = weight(*sizes)
    b, a = factors(w, kind=kind, rank=RANK, scale=SCALE)
    expected_b, expected_a = reference(w, kind)
    signs = (b.double() * expected_b).sum(0).sign()
    torch.testing.assert_close(b.double(), expected_b * signs, rtol=0, atol=2e-6)
    torch.testing.assert_close(a.double(), signs[:, None] * expected_a, rtol=0, atol=2e-6)
    largest = b.gather(0, b.abs().argmax(0)[None])
    assert (largest > 0).all()
    assert all(torch.equal(*pair) for pair in zip((b, a), factors(w, kind=kind, rank=RANK, scale=SCALE), strict=True))


@pytest.mark.parametrize(("kind", "left"), [("PiSSA", slice(RANK, None)), ("MiLoRA", slice(0, -RANK))])
@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_the_residual_lacks_exactly_those_singular_values_whatever_the_scale(
    kind: Any, left: slice, scale: float
) -> None:
    w = weight(20, 32)
    b, a = factors(w, kind=kind, rank=RANK, scale=scale)
    rest = torch.linalg.svdvals(w.double() - scale * (b.double() @ a.double()))
    torch.testing.assert_close(rest[:-RANK], torch.linalg.svdvals(w.double())[left], rtol=0, atol=1e-5)
    assert rest[-RANK:].max() < 1e-5


@pytest.mark.parametrize(("kind", "name"), [("PiSSA", "pissa"), ("OLoRA", "olora"), ("MiCA", "mica")])
def test_peft_starts_from_the_same(kind: Any, name: str) -> None:
    w = weight(16, 40)
    linear = nn.Linear(40, 16, bias=False)
    linear.weight = nn.Parameter(w.clone())
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALE, init_lora_weights=name, target_modules=["0"])  # type: ignore[arg-type]
    layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    theirs_b, theirs_a = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
    b, a = factors(w, kind=kind, rank=RANK, scale=SCALE)
    torch.testing.assert_close(w - SCALE * b @ a, layer.base_layer.weight.detach(), rtol=0, atol=5e-6)
    torch.testing.assert_close(b @ b.T, theirs_b @ theirs_b.T, rtol=0, atol=5e-6)
    torch.testing.assert_close(a.T @ a, theirs_a.T @ theirs_a, rtol=0, atol=5e-5)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rank", [2, 10])
def test_a_weight_that_lacks_rank_still_has_orthonormal_smallest_directions(sizes: tuple[int, int], rank: int) -> None:
    """All or some of the smallest directions are of its null space."""
    w = weight(sizes[0], 10).double() @ weight(10, sizes[1], seed=1).double()
    found = decompose(w, "Smallest", rank)
    left, values, right = (torch.from_numpy(a).double() for a in (found.left, found.values, found.right))
    one = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(left.T @ left, one, rtol=0, atol=1e-6)
    torch.testing.assert_close(right @ right.T, one, rtol=0, atol=1e-6)
    torch.testing.assert_close(w @ right.T, left * values, rtol=0, atol=1e-4)
    torch.testing.assert_close(w.T @ left, right.T * values, rtol=0, atol=1e-4)


def test_small_singular_values_are_as_exact_as_large_ones() -> None:
    """A Gram matrix alone would give the right-hand vectors of the smallest with errors of 1e-4 and more."""
    u, v = (torch.linalg.qr(weight(30, 30, seed=s).double())[0] for s in (0, 1))
    values = torch.logspace(0, -6, 30, dtype=torch.float64)
    w = u @ values.diag() @ v.T
    found = decompose(w, "Smallest", 3)
    right = torch.from_numpy(found.right).double()
    torch.testing.assert_close((right @ v[:, -3:]).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(found.values).double(), values[-3:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_a_larger_rank_hold_those_of_a_smaller_one(kind: Any) -> None:
    w, decomposition = weight(40, 16), DECOMPOSITIONS[kind]
    part, alone = decompose(w, decomposition, 8).some(decomposition, 2), decompose(w, decomposition, 2)
    for name in ("left", "values", "right"):
        torch.testing.assert_close(
            torch.from_numpy(getattr(part, name)), torch.from_numpy(getattr(alone, name)), rtol=0, atol=2e-6
        )


def test_more_factors_than_a_weight_has_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"rank: expected at most 16 for a weight of \(40, 16\), found 32"):
        decompose(weight(40, 16), "Largest", 32)
