"""The sequences on which revisions are compared, chosen once per run and kept across restarts of its driver.

A revision's parent is then compared by numbers that are already stored, instead of being served again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from allele.protocol.commands import ProbeSequence
from allele.store import Fact
from allele_driver.loop.ledger import Ledger
from allele_driver.loop.rollout import ActivePart, Roller


async def with_probes(
    active: Sequence[ActivePart], roller: Roller, ledger: Ledger, facts: Sequence[Fact]
) -> tuple[ActivePart, ...]:
    """Each part with the probes of its members' newest revision, or with new ones."""
    found = []
    for a in active:
        known = await _known(a, ledger, facts)
        found.append(dataclasses.replace(a, probes=known or await roller.probes(a)))
    return tuple(found)


async def _known(active: ActivePart, ledger: Ledger, facts: Sequence[Fact]) -> tuple[ProbeSequence, ...]:
    """Probes of the last commit for these members, if it was for the same environment."""
    members = {m.name for m in active.part.members}
    for fact in reversed(facts):
        if fact.kind == "Committed" and fact.provenance is not None and fact.member in members:
            provenance = await ledger.read(fact.provenance)
            same = provenance.environment == active.spec.environment.path
            return provenance.probes if same else ()
    return ()
