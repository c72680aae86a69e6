"""A gateway that serves some members wrongly, as a bug in loading would: `python -m … FAULTS.json <gateway arguments>`.

The file holds {member: fault} and is read at each look, so that a test can break and mend a running gateway. What is
wrong is only what the gateway takes for the revision; everything behind that is as ever.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from allele.format import AdapterShape
from allele.store.facts import Fact
from allele_rollout.gateway import __main__ as gateway
from allele_rollout.gateway import populations
from allele_rollout.gateway.adapter import Adapter
from tests.driver.driver_parts import BASE


class FaultyPopulation(populations.Population):
    faults: Path

    async def _adapter(self, fact: Fact) -> Adapter:
        match json.loads(self.faults.read_text()).get(fact.member):
            case "parent's bytes" if (parent := self.parent(fact)) is not None:
                return await super()._adapter(_with_bytes_of(fact, parent))
            case "inert":
                return await super()._adapter(await self._inert(fact))
            case "wrong scale":
                provenance = await self.provenance(fact)
                shapes = {g: s.model_copy(update={"alpha": 2 * s.alpha}) for g, s in provenance.shapes.items()}
                wrong = f"{fact.provenance} doubled"
                self._provenance[wrong] = provenance.model_copy(update={"shapes": shapes})
                return await super()._adapter(dataclasses.replace(fact, provenance=wrong))
        return await super()._adapter(fact)

    async def _inert(self, fact: Fact) -> Fact:
        """All zeros: it does nothing."""
        assert fact.weights is not None
        spec = (await self.provenance(fact)).shapes[fact.group]
        shape = AdapterShape.from_model(
            json.loads((BASE / "config.json").read_text()), rank=spec.stored_rank, targets=spec.targets
        )
        row = np.zeros(shape.numel, "<f4")
        (weights,) = self._store.write_segments({fact.member: shape.pack(row)}).values()
        return dataclasses.replace(
            fact, segment=weights.path, offset=weights.offset, length=weights.length, digest=weights.digest
        )


def _with_bytes_of(fact: Fact, other: Fact) -> Fact:
    return dataclasses.replace(
        fact, segment=other.segment, offset=other.offset, length=other.length, digest=other.digest
    )


if __name__ == "__main__":
    FaultyPopulation.faults = Path(sys.argv[1])
    populations.Population = FaultyPopulation  # type: ignore[misc]
    asyncio.run(gateway._main(sys.argv[2:]))
