"""Valid manifests of each kind, and variants of them."""

from __future__ import annotations

import copy
from typing import Any

DIGEST = "sha256:" + "a" * 64
TRAIN = {
    "select": {"group": "g"},
    "environment": {"path": "task:Environment"},
    "optimizer": {"learningRate": 1e-3},
}
IMAGES = {"trainer": "trainer:1", "engine": "engine:1", "gateway": "gateway:1", "driver": "driver:1"}
SPECS: dict[str, dict[str, Any]] = {
    "AdapterStore": {"bucket": "adapters", "endpoint": "http://s3:7070", "credentials": {"secretName": "s3"}},
    "AdapterRuntime": {"images": IMAGES},
    "BasePool": {
        "base": {"uri": "s3://adapters/bases/tiny", "digest": DIGEST},
        "runtimeRef": "rt",
        "storeRef": "st",
        "trainer": {"slots": 16},
    },
    "AdapterPopulation": {
        "base": {"digest": DIGEST},
        "storeRef": "st",
        "groups": [{"name": "g", "members": {"count": 16}}],
    },
    "RLRun": {"populationRef": "p", "poolRef": "pool", "groups": [TRAIN], "stop": {"steps": 40}},
}


def manifest(kind: str, *, name: str = "x", **changes: Any) -> dict[str, Any]:
    """A valid object with fields of its spec replaced: a dotted path → value, None removes.

    A path is written with `__` for the dot, also before an index: groups__0__select__group.
    """
    spec = copy.deepcopy(SPECS[kind])
    for path, value in changes.items():
        *parents, last = path.split("__")
        at: Any = spec
        for key in parents:
            at = at[int(key)] if key.isdigit() else at.setdefault(key, {})
        if value is None:
            at.pop(last, None)
        else:
            at[int(last) if last.isdigit() else last] = value
    return {"apiVersion": "allele.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
