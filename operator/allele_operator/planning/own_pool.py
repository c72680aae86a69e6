"""The pool of a run that names a runtime: as large as the run needs, owned by it, asleep when the run is over."""

from __future__ import annotations

from allele.api.population import AdapterPopulationSpec
from allele.api.run import RLRunSpec
from allele.api.schema import API_VERSION
from allele_operator.planning import naming, selection
from allele_operator.planning.model import RUN_LABEL, Obj

MOST_SLOTS = 64
"""Training slots of such a pool at most; larger runs train their members in waves."""


def own_pool(run: Obj, spec: RLRunSpec, population: AdapterPopulationSpec, *, suspend: bool) -> Obj:
    """Manifest of the BasePool."""
    name = run["metadata"]["name"]
    selected = {g.select.group for g in spec.groups}
    adapters = [g.adapter for g in population.groups if g.name in selected]
    size = spec.pace.cohort or selection.size(spec, population) or MOST_SLOTS
    slots = min(size, MOST_SLOTS)
    return naming.applied(
        {
            "apiVersion": API_VERSION,
            "kind": "BasePool",
            "metadata": {
                "name": naming.own_pool(name),
                "namespace": run["metadata"]["namespace"],
                "labels": naming.queue_labels(run) | {RUN_LABEL: name},
                "ownerReferences": [naming.owner_reference(run)],
            },
            "spec": {
                "base": {"uri": spec.base_uri, "digest": population.base.digest},
                "runtimeRef": spec.runtime_ref,
                "storeRef": population.store_ref,
                "adapters": {
                    "maxRank": max(a.stored_rank for a in adapters),
                    "targets": list(dict.fromkeys(t for a in adapters for t in a.targets)),
                },
                "trainer": {"slots": slots},
                "rollout": {"replicas": 1, "slots": slots},
                "suspend": suspend,
            },
        }
    )
