"""Where adapters are kept: objects, segments, the catalogue of facts, its index, provenance, and base models.

The store is the truth: a revision exists once a commit to the catalogue names its bytes, and not before.
`allele.store.bases` and `allele.store.capability` are imported by their own names.
"""

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
from allele.store.provenance import BaseRef, DataRange, Provenance, ShapeRef, Versions
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
    "ShapeRef",
    "StoreError",
    "StoreRefused",
    "StoreUnavailable",
    "Versions",
    "Writer",
]
