"""Jobs that do one thing and say in their termination message what came of it: have they ended, with which words, and
when is it time to try again?"""

from __future__ import annotations

import json
from datetime import datetime, timedelta

from allele_operator.planning import observe
from allele_operator.planning.conditions import parse
from allele_operator.planning.model import Obj, World

SOONEST = timedelta(seconds=10)
LATEST = timedelta(seconds=300)


def ended(job: Obj) -> Obj | None:
    """The condition that says that it is over."""
    return next(
        (c for c in job["status"]["conditions"] if c["type"] in ("Complete", "Failed") and c["status"] == "True"), None
    )


def report(job: Obj, world: World) -> Obj:
    """What its newest pod that says something said, {} when none did or it is not a JSON object."""
    pods = sorted(world.owned(job["metadata"]["uid"], "Pod"), key=lambda p: str(p["metadata"]["creationTimestamp"]))
    for pod in reversed(pods):
        for container in pod["status"]["containers"]:
            try:
                found = json.loads((container.get("terminated") or {}).get("message", ""))
            except ValueError:
                continue
            if isinstance(found, dict):
                return found
    return {}


def again(obj: Obj, condition: str, end: Obj) -> datetime:
    """When to try again: after as long as the condition has been False, within SOONEST and LATEST."""
    old, over = observe.condition(obj, condition), parse(end["lastTransitionTime"])
    since = parse(old["lastTransitionTime"]) if old.get("status") == "False" else over
    return over + min(max(over - since, SOONEST), LATEST)
