"""What an adapter starts as, what its numbers are multiplied by, and which base that goes with.

PiSSA, MiLoRA, OLoRA and OLoRA-tail start from factors B0·A0 of the base, so s·B0·A0 must be taken away again for a new
adapter to equal the base: either in the base, which then is another base that trainer and rollouts must both load, or
in the adapter itself. An adapter on the wrong one of the two bases trains and serves something that nobody meant,
without an error: `mix_up` finds that before anything starts.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from allele.protocol.wire import Wire

InitKind = Literal["Standard", "PiSSA", "MiLoRA", "OLoRA", "OLoRATail", "MiCA"]
BaseMode = Literal["Untouched", "SharedResidual", "Rank2r"]
Scaling = Literal["Standard", "RankStabilised", "Fixed"]

UNTOUCHED: tuple[InitKind, ...] = ("Standard", "MiCA")
"""Kinds whose B·A is zero at the start: nothing has to be taken away."""

MAX_RANK = 256

RESIDUAL = "residual.json"
"""Only in the folder of a residual base."""

RESIDUAL_ADAPTER = "residual"
"""Below it: a PEFT folder with B0 and A0. In a folder of its own, as every safetensors file beside the config would be
taken for a part of the base."""


class InitSpec(Wire):
    """`base_mode`: Untouched trains over the base as it is; SharedResidual over W − s·B0·A0, a base of its own; Rank2r
    over the base, with −B0 and A0 as a second, frozen half of the adapter."""

    kind: InitKind = "Standard"
    base_mode: BaseMode = "Untouched"

    @model_validator(mode="after")
    def _goes_together(self) -> InitSpec:
        if (self.kind in UNTOUCHED) != (self.base_mode == "Untouched"):
            wanted = "Untouched" if self.kind in UNTOUCHED else "SharedResidual or Rank2r"
            raise ValueError(f"init: expected baseMode {wanted} with kind {self.kind}, found {self.base_mode}")
        return self


def scale_of(*, alpha: float, rank: int, scaling: Scaling) -> float:
    """Factor on B·A·x: alpha/r, alpha/√r (rsLoRA, arXiv:2312.03732), or alpha itself; `rank`: of what trains."""
    return alpha / {"Standard": rank, "RankStabilised": math.sqrt(rank), "Fixed": 1}[scaling]


def stored_rank(rank: int, base_mode: BaseMode) -> int:
    """Rank of the adapter as trainer, store and engines have it."""
    return 2 * rank if base_mode == "Rank2r" else rank


class Residual(Wire):
    """`residual.json`: which base this one is the residual of, and what was taken out of each target."""

    source_digest: str
    kind: InitKind
    rank: int
    alpha: float
    scaling: Scaling
    targets: tuple[str, ...]
    factors: str
    """sha256 (hex) of the numbers of B0 and A0, as they start an adapter."""

    def __str__(self) -> str:
        scale = scale_of(alpha=self.alpha, rank=self.rank, scaling=self.scaling)
        return described(self.kind, self.rank, scale, self.targets)


def described(kind: str, rank: int, scale: float, targets: tuple[str, ...]) -> str:
    return f"{kind} of rank {rank}, scale {scale:g}, on {', '.join(sorted(targets))}"


def mix_up(
    init: InitSpec, *, rank: int, scale: float, targets: tuple[str, ...], base: str, residual: Residual | None
) -> str | None:
    """Why an adapter must not be trained on the base of digest `base`; None when they go together."""
    if init.base_mode != "SharedResidual":
        if residual is None:
            return None
        return (
            f"init {init.kind}, {init.base_mode}: expected the base {residual.source_digest} itself, found {base}, its "
            f"residual after {residual}; name the first in pool and population"
        )
    wanted = described(init.kind, rank, scale, targets)
    if residual is None:
        return (
            f"init {init.kind}, SharedResidual: expected a residual base of {base} after {wanted}, found {base} itself "
            f"(no {RESIDUAL}); make one with `allele base residual` and name its digest in pool and population"
        )
    found = scale_of(alpha=residual.alpha, rank=residual.rank, scaling=residual.scaling)
    same = (residual.kind, residual.rank, sorted(residual.targets)) == (init.kind, rank, sorted(targets))
    if same and math.isclose(found, scale, rel_tol=1e-9):
        return None
    return (
        f"init {init.kind}, SharedResidual: expected a residual base of {residual.source_digest} after {wanted}, found "
        f"{base}, after {residual}; make one with `allele base residual` and name its digest in pool and population"
    )
