"""What a driver is given: the resources as they were applied, in one file."""

from __future__ import annotations

from allele.api.population import AdapterPopulationSpec
from allele.api.run import RLRunSpec
from allele.api.schema import Model


class RunBundle(Model):
    """`run.json` in the driver's --run-dir. Manifests lie beside it as manifests/<configMap>/<key>."""

    namespace: str
    run: str
    run_uid: str
    run_generation: int = 1
    population: str
    population_uid: str
    population_generation: int = 1
    run_spec: RLRunSpec
    population_spec: AdapterPopulationSpec
    base_uri: str
    image: str = ""
