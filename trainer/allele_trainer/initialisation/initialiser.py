"""First rows of adapters that start from the base, and the refusal of those that belong to another base.

A row depends on the base and the adapter's spec alone, so all members of a group start from the same one. The ranks of
a trainer deal the modules among them; what one has computed the others read from the store.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from allele.format import AdapterShape, ShapeMismatch
from allele.format.peft import WEIGHTS
from allele.protocol.commands import AdapterSpec
from allele.protocol.errors import DigestMismatch, InvalidRequest
from allele.protocol.initialisation import RESIDUAL, RESIDUAL_ADAPTER, Residual, mix_up
from allele.store.factors import Decomposition, Factors, FactorStore
from allele_trainer.agreement import agreed
from allele_trainer.bank.start import from_bytes
from allele_trainer.initialisation import rows
from allele_trainer.initialisation.factors import DECOMPOSITIONS
from allele_trainer.initialisation.source import FactorSource
from allele_trainer.parallel import Ranks


@dataclasses.dataclass(frozen=True, eq=False)
class First:
    """How an adapter starts: its whole row `[P]`, and the digest of the factors in it (`Residual.factors`)."""

    row: Tensor
    digest: str


class Initialiser:
    def __init__(self, base: pathlib.Path, *, digest: str, store: FactorStore, ranks: Ranks) -> None:
        """`base`: folder of the base that is loaded, whose digest was checked."""
        self._base, self._digest, self._ranks = base, digest, ranks
        self.source = FactorSource(base, store)
        self._config: Mapping[str, Any] = json.loads((base / "config.json").read_text())
        path = base / RESIDUAL
        self._residual = Residual.model_validate_json(path.read_bytes()) if path.exists() else None

    def check(self, spec: AdapterSpec) -> None:
        """Raises InvalidRequest, naming both digests, for an adapter of another base than the one loaded."""
        wrong = mix_up(
            spec.init,
            rank=spec.rank,
            scale=spec.scale,
            targets=spec.targets,
            base=self._digest,
            residual=self._residual,
        )
        if wrong:
            raise InvalidRequest(wrong)

    def first(self, spec: AdapterSpec) -> First:
        """Of a spec that `check` passes and whose kind is not Standard. Collective: all ranks get it, or none.

        Raises InvalidRequest for a rank that a module does not have, DigestMismatch for damaged factors.
        """
        shape = rows.trained_shape(self._config, spec)
        if spec.init.base_mode == "SharedResidual":
            row = agreed(self._ranks, lambda: self._of_residual(shape))
            return First(row, rows.digest(row))
        found = self._factors(rows.weights(shape), DECOMPOSITIONS[spec.init.kind], spec.rank)
        row = rows.first(shape, found, kind=spec.init.kind, scale=spec.scale)
        digest = rows.digest(row)
        if spec.init.base_mode == "Rank2r":
            stored = AdapterShape.from_model(self._config, rank=spec.stored_rank, targets=spec.targets)
            row = rows.doubled(row, shape, stored)
        return First(row, digest)

    def _of_residual(self, shape: AdapterShape) -> Tensor:
        assert self._residual is not None
        path = self._base / RESIDUAL_ADAPTER / WEIGHTS
        try:
            row = from_bytes(shape.unpack(path.read_bytes()))
        except (OSError, ShapeMismatch) as e:
            raise InvalidRequest(f"{path}: expected what was taken out of the base: {e}") from e
        if rows.digest(row) != self._residual.factors:
            raise DigestMismatch(f"{path}: expected sha256 {self._residual.factors}, found {rows.digest(row)}")
        return row

    def _factors(
        self, modules: Mapping[str, tuple[int, int]], decomposition: Decomposition, rank: int
    ) -> dict[str, Factors]:
        """Of every module, on every rank, the same bytes: each rank finds its deal, the others read what it found."""
        ranks, mine = self._ranks, dict(list(modules.items())[self._ranks.rank :: self._ranks.size])
        found = agreed(ranks, lambda: self.source.find(mine, decomposition, rank))
        if ranks.size > 1:
            told = ranks.gather(json.dumps({name: f.rank for name, f in found.items()}).encode())
            kept = {name: k for data in told for name, k in json.loads(data).items() if name not in mine}
            found |= agreed(ranks, lambda: self.source.read(kept, decomposition, modules))
        return {name: found[name].some(decomposition, rank) for name in modules}
