"""The sequences on which revisions are compared, chosen once per run and kept across restarts of its driver.

A revision's parent is then compared by numbers that are already stored, instead of being served again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from allele.protocol.commands import ProbeSequence
from allele_driver.loop.ledger import Ledger
from allele_driver.loop.rollout import ActivePart, Roller


async def with_probes(active: Sequence[ActivePart], roller: Roller, ledger: Ledger) -> tuple[ActivePart, ...]:
    """Each part with the probes of its members' newest revision, or with new ones."""
    found = []
    for a in active:
        known = await _known(a, ledger)
        found.append(dataclasses.replace(a, probes=known or await roller.probes(a)))
    return tuple(found)


async def _known(active: ActivePart, ledger: Ledger) -> tuple[ProbeSequence, ...]:
    """Probes of the last commit for these members, if it was for the same environment."""
    newest = (ledger.index.newest(m.name) for m in active.part.members)
    last = max((f for f in newest if f is not None), key=lambda f: f.order, default=None)
    if last is None or last.provenance is None:
        return ()
    provenance = await ledger.read(last.provenance)
    return provenance.probes if provenance.environment == active.spec.environment.path else ()
