"""Whether a revision may be exposed, from numbers: pure.

A served adapter must give the logprobs that the trainer computed from the exported bytes (else wrong bytes, wrong scale
or a wrong base), and must differ from its parent (else the parent's bytes or an inert adapter are being served).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

from allele.protocol.serving import Gate, ProbeResult, Target

Verdict = Literal["Passed", "Gap", "NotMoved", "LoadFailed"]


def judge(
    target: Target,
    *,
    served: Sequence[float | None],
    trained: Sequence[float],
    before: Sequence[float | None],
    gate: Gate,
) -> ProbeResult:
    """Verdict on one target. All sequences hold one logprob per completion token of the probe, in the same order.

    `before` is the parent under the same probe. A missing or non-finite number never passes.
    """

    result = functools.partial(_result, target)
    if not trained or len(served) != len(trained):
        return result("Gap", f"probe: expected {len(trained)} logprobs (at least one), the engine served {len(served)}")
    gaps, moves = _differences(served, trained), _differences(served, before)
    if gaps is None:
        return result("Gap", "probe: a served or trained logprob is missing or not finite")
    gap, move = max(gaps), max(moves) if moves else None
    result = functools.partial(result, max_gap=gap, mean_gap=sum(gaps) / len(gaps), move=move)
    if gap > gate.max_gap:
        return result("Gap", f"max |served - trained|: expected at most {gate.max_gap:g}, found {gap:g}")
    if move is None:
        return result("NotMoved", f"parent: expected {len(served)} finite logprobs, found {len(before)} or not finite")
    if move < gate.min_move:
        return result("NotMoved", f"max |served - parent|: expected at least {gate.min_move:g}, found {move:g}")
    return result("Passed")


def _differences(a: Sequence[float | None], b: Sequence[float | None]) -> list[float] | None:
    """|a - b| by position; None when they cannot be compared."""
    if len(a) != len(b) or not a:
        return None
    out = [math.inf if x is None or y is None else abs(x - y) for x, y in zip(a, b, strict=True)]
    return out if all(math.isfinite(d) for d in out) else None


def _result(target: Target, verdict: Verdict, message: str = "", **numbers: float | None) -> ProbeResult:
    found = {"member": target.member, "revision": target.revision, "verdict": verdict, "message": message}
    return ProbeResult.model_validate(found | numbers)
