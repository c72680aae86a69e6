"""What a pool's gateways report, summed up: where adapters are, how they are published, which engines answer.

Every replica reports for itself, and is believed while its pod is there and for STALE after its last report: one that
hangs must not be counted for ever. An operator that has just started knows nothing yet and leaves what the status says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from allele.protocol.serving import GatewayStatus, Tier
from allele_operator.planning import observe
from allele_operator.planning.conditions import Found
from allele_operator.planning.model import GatewaySeen, Obj

STALE = timedelta(seconds=45)
"""Gateways report every ten seconds."""
BULK = "BulkPublishing"
_FIELDS = ("engines", "tiers", "publishPath")
_REASONS = 2
"""Messages of replicas that are told; of the others only how many."""


@dataclasses.dataclass(frozen=True)
class Summary:
    status: Obj
    conditions: tuple[Found, ...] = ()
    requeue: float | None = None
    """Seconds until a report becomes too old."""


def summed(
    pool: Obj, seen: Sequence[GatewaySeen], pods: Collection[str], *, listening: datetime, now: datetime
) -> Summary:
    """`pods`: uids of the rollout pods that are there."""
    fresh = [s for s in seen if s.pod_uid in pods and now - s.at < STALE]
    if fresh:
        oldest = min(s.at for s in fresh)
        found = [s.status for s in sorted(fresh, key=lambda s: s.status.replica)]
        status = {"engines": _engines(found), "tiers": _tiers(found)}
        # which path it is, a gateway knows when its engine has started
        attached = [s for s in found if s.engine != "Starting"]
        status |= {"publishPath": _path(attached)} if attached else _old(pool, "publishPath")
        bulk = (_bulk(attached),) if attached else _kept(pool)
        return Summary(status, bulk, (oldest + STALE - now).total_seconds())
    if pods and now - listening < STALE and pool["status"].get("engines"):
        return Summary(_old(pool, *_FIELDS), _kept(pool), (listening + STALE - now).total_seconds())
    return Summary({})


def _engines(found: Sequence[GatewayStatus]) -> Obj:
    return {name.lower(): sum(s.engine == name for s in found) for name in ("Ready", "Starting", "Failed")}


def _tiers(found: Sequence[GatewayStatus]) -> list[Obj]:
    by_name: dict[str, list[Tier]] = {}
    for tier in (t for s in found for t in s.tiers):
        by_name.setdefault(tier.name, []).append(tier)
    return [
        {"name": name, **{f: sum(getattr(t, f) for t in tiers) for f in ("adapters", "bytes", "capacity")}}
        for name, tiers in by_name.items()
    ]


def _path(found: Sequence[GatewayStatus]) -> str:
    paths = {s.publish_path for s in found}
    return paths.pop() if len(paths) == 1 else "Mixed"


def _bulk(found: Sequence[GatewayStatus]) -> Found:
    native = [s for s in found if s.publish_path == "Native"]
    if not native:
        text = f"all gateways ({len(found)}) publish new revisions in one call"
        return Found(BULK, True, "Bulk", text, flickers=True)
    why = list(dict.fromkeys(f"{s.replica}: {s.publish_path_message or 'no reason given'}" for s in native))
    more = f"; and {len(why) - _REASONS} more" if len(why) > _REASONS else ""
    text = f"{len(native)} of {len(found)} gateways publish adapters one by one: {'; '.join(why[:_REASONS])}{more}"
    return Found(BULK, False, _path(found), text, "Warning", flickers=True)


def _old(pool: Obj, *fields: str) -> Obj:
    return {k: pool["status"][k] for k in fields if k in pool["status"]}


def _kept(pool: Obj) -> tuple[Found, ...]:
    old = observe.condition(pool, BULK)
    return (Found(BULK, old["status"] == "True", old["reason"], old["message"]),) if old else ()
