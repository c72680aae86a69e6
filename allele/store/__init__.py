"""Where adapters are kept: objects, segments, the catalogue of facts, its index, provenance, and base models.

The store is the truth: a revision exists once a commit to the catalogue names its bytes, and not before.
`allele.store.bases` and `allele.store.capability` are imported by their own names. Names are looked up when they are
used, so that the probe of a store loads neither tables nor arrays.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from allele.store.catalogue import Catalogue, Changes
    from allele.store.errors import (
        AlreadyExists,
        BaseMismatch,
        FencedError,
        InvalidFact,
        ObjectNotFound,
        OwnershipError,
        StoreError,
        StoreRefused,
        StoreUnavailable,
    )
    from allele.store.facts import Fact
    from allele.store.index import Index
    from allele.store.objects import ObjectInfo, Objects
    from allele.store.population import PopulationRecord, PopulationStore
    from allele.store.provenance import BaseRef, DataRange, Provenance, SamplingRef, ShapeRef, Versions
    from allele.store.writer import Writer

__all__ = [
    "AlreadyExists",
    "BaseMismatch",
    "BaseRef",
    "Catalogue",
    "Changes",
    "DataRange",
    "Fact",
    "FencedError",
    "Index",
    "InvalidFact",
    "ObjectInfo",
    "ObjectNotFound",
    "Objects",
    "OwnershipError",
    "PopulationRecord",
    "PopulationStore",
    "Provenance",
    "SamplingRef",
    "ShapeRef",
    "StoreError",
    "StoreRefused",
    "StoreUnavailable",
    "Versions",
    "Writer",
]

_HOMES = {
    "AlreadyExists": "errors",
    "BaseMismatch": "errors",
    "BaseRef": "provenance",
    "Catalogue": "catalogue",
    "Changes": "catalogue",
    "DataRange": "provenance",
    "Fact": "facts",
    "FencedError": "errors",
    "Index": "index",
    "InvalidFact": "errors",
    "ObjectInfo": "objects",
    "ObjectNotFound": "errors",
    "Objects": "objects",
    "OwnershipError": "errors",
    "PopulationRecord": "population",
    "PopulationStore": "population",
    "Provenance": "provenance",
    "SamplingRef": "provenance",
    "ShapeRef": "provenance",
    "StoreError": "errors",
    "StoreRefused": "errors",
    "StoreUnavailable": "errors",
    "Versions": "provenance",
    "Writer": "writer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
