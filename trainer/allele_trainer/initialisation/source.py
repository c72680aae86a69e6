"""Factors of the modules of one base: from the store where they are, else computed and kept there."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from allele.protocol.errors import InvalidRequest
from allele.store.factors import Decomposition, Factors, FactorStore
from allele_trainer.initialisation.decompositions import decompose
from allele_trainer.model.convert import Weights

Sizes = tuple[int, int]
"""(out, in) of a weight."""

_READS = 16
"""Objects of the store that are asked for at a time."""


class FactorSource:
    def __init__(self, base: pathlib.Path, store: FactorStore) -> None:
        """`base`: its folder; `store`: of its digest."""
        self._base, self._store = base, store
        self.computed = 0
        """Modules so far that had no factors in the store."""

    def find(
        self,
        modules: Mapping[str, Sizes],
        decomposition: Decomposition,
        rank: int,
        *,
        progress: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Factors]:
        """Of `rank` or more for each module, in the store from then on; `progress` is told how many there are.

        Raises what the store raises, or InvalidRequest for a module that has not so many.
        """
        ranks = sorted({rank, *(k for k in self._store.ranks(decomposition) if k > rank)})

        def kept(name: str) -> Factors | None:
            found = (self._store.read(name, decomposition, k, sizes=modules[name]) for k in ranks)
            return next((f for f in found if f is not None), None)

        with ThreadPoolExecutor(_READS) as pool:
            known = dict(zip(modules, pool.map(kept, modules), strict=True))
        done = {name: f for name, f in known.items() if f is not None}
        progress(len(done))
        for name in modules:
            if name not in done:
                done[name] = self._store.create(name, decomposition, self._computed(name, decomposition, rank))
                progress(len(done))
        return done

    def read(
        self, kept: Mapping[str, int], decomposition: Decomposition, sizes: Mapping[str, Sizes]
    ) -> dict[str, Factors]:
        """Of modules that are known to be kept, of the rank that `kept` says."""

        def one(name: str) -> Factors:
            found = self._store.read(name, decomposition, kept[name], sizes=sizes[name])
            if found is None:
                raise InvalidRequest(f"{name}: expected factors that were just found in the store, found none")
            return found

        with ThreadPoolExecutor(_READS) as pool:
            return dict(zip(kept, pool.map(one, kept), strict=True))

    def _computed(self, module: str, decomposition: Decomposition, rank: int) -> Factors:
        self.computed += 1
        try:
            return decompose(self._weights(f"{module}.weight"), decomposition, rank)
        except InvalidRequest as e:
            raise InvalidRequest(f"{module}: {e}") from e

    @functools.cached_property
    def _weights(self) -> Weights:
        return Weights(self._base)
