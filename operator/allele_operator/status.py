"""The one status write of a reconcile: what to send, and whether it can wait.

A merge patch leaves what it does not name, so fields that the new status lacks are named with null. Numbers that move
with every step of a run are written at most once per interval; everything else, and the first of each number, at once.
"""

from __future__ import annotations

from typing import Any

from allele_operator.planning.model import Obj

MOVING = frozenset(
    {
        *("progress", "reward", "policyLag", "members", "trained", "failed", "committed", "exposed", "revisions"),
        *("slots", "tiers", "engines", "publishPath"),
    }
)
"""Fields of a status that follow the reports of drivers and gateways."""

MOVING_CONDITIONS = frozenset({"Exposed", "BulkPublishing"})
"""Conditions that do: what probes find may differ with each step."""


def merge_patch(old: Obj, new: Obj) -> Obj:
    """The smallest merge patch (RFC 7386) that turns `old` into `new`; {} when they are equal."""
    patch: Obj = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := merge_patch(before, value):
                patch[key] = inner
        elif key not in old or before != value:
            patch[key] = value
    return patch


def urgent(old: Obj, new: Obj) -> bool:
    """Whether the change is more than numbers that moved on, and sentences about what is well."""
    return _still(old) != _still(new) or any(key in new and key not in old for key in MOVING)


def _still(status: Obj) -> dict[str, Any]:
    """Without what moves with each step: "step 3 of 40" is a sentence of a true condition."""
    kept = {k: v for k, v in status.items() if k not in MOVING}
    kept["conditions"] = [
        {k: v for k, v in c.items() if k != "message" or c["status"] != "True"}
        for c in status.get("conditions") or ()
        if c["type"] not in MOVING_CONDITIONS
    ]
    return kept
