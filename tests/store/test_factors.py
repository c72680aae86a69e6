"""Factors of a base are kept once: the first one's bytes for everybody, checked whenever they are read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from allele.protocol.errors import DigestMismatch
from allele.store.factors import Factors, FactorStore
from allele.store.objects import Objects

SIZES = (6, 4)
MODULE = "model.layers.0.self_attn.q_proj"


def some(rank: int, seed: int = 0) -> Factors:
    rng = np.random.default_rng(seed)
    left, values, right = (rng.normal(size=s).astype(np.float32) for s in ((6, rank), (rank,), (rank, 4)))
    return Factors(left, values, right)


def same(one: Factors, other: Factors | None) -> bool:
    return other is not None and all(
        np.array_equal(getattr(one, n), getattr(other, n)) for n in ("left", "values", "right")
    )


@pytest.fixture
def objects(store_url: str) -> Objects:
    return Objects.open(store_url)


@pytest.fixture
def factors(objects: Objects) -> FactorStore:
    return FactorStore(objects, "sha256:" + "a" * 64)


def test_the_first_ones_bytes_are_kept_and_the_later_one_goes_on_with_them(factors: FactorStore) -> None:
    first, later = some(2), some(2, seed=1)
    assert same(first, factors.create(MODULE, "Largest", first))
    assert same(first, factors.create(MODULE, "Largest", later))
    assert same(first, factors.read(MODULE, "Largest", 2, sizes=SIZES))


def test_bases_decompositions_ranks_and_modules_are_apart(objects: Objects, factors: FactorStore) -> None:
    factors.create(MODULE, "Smallest", some(2))
    factors.create(MODULE, "Smallest", some(4))
    factors.create(MODULE, "QR", some(1))
    assert (factors.ranks("Smallest"), factors.ranks("QR"), factors.ranks("Largest")) == ([2, 4], [1], [])
    assert factors.read(MODULE, "Largest", 2, sizes=SIZES) is None
    assert factors.read(f"{MODULE}.x", "Smallest", 2, sizes=SIZES) is None
    assert FactorStore(objects, "sha256:" + "b" * 64).ranks("Smallest") == []


def test_of_the_smallest_the_last_are_those_of_a_smaller_rank() -> None:
    whole = some(4)
    assert np.array_equal(whole.some("Smallest", 1).left, whole.left[:, 3:])
    assert np.array_equal(whole.some("Largest", 3).right, whole.right[:3])
    assert same(whole, whole.some("QR", 4))


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda b: b[:-40] + b"\0" + b[-39:],
    lambda b: b[:-1],
    lambda b: b"",
    lambda b: b * 2,
]


@pytest.mark.parametrize("change", DAMAGES)
def test_damaged_factors_are_refused_by_file(factors: FactorStore, change: Callable[[bytes], bytes]) -> None:
    factors.create(MODULE, "Largest", some(2))
    path = f"Largest-2/{MODULE}.safetensors"
    factors.objects.put(path, change(factors.objects.get(path)))
    with pytest.raises(DigestMismatch, match=rf"{MODULE}\.safetensors.*expected.*found.*delete the file"):
        factors.read(MODULE, "Largest", 2, sizes=SIZES)


def test_others_read_it_as_safetensors(factors: FactorStore) -> None:
    from safetensors.numpy import load

    factors.create(MODULE, "Largest", some(2))
    found = load(factors.objects.get(f"Largest-2/{MODULE}.safetensors"))
    assert np.array_equal(found["left"], some(2).left) and found["right"].shape == (2, 4)
