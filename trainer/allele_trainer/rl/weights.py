"""What a row counts in its member's loss: from the member's own rows in the whole command, before any splitting."""

from __future__ import annotations

from collections.abc import Sequence

from allele.protocol.losses import Averaged, LossSpec, PreferenceLoss


def row_weights(lengths: Sequence[int], spec: LossSpec) -> list[float]:
    """Weight of each token of each of a member's completions of `lengths` tokens; see `allele.protocol.losses.Mean`."""
    mean = "Sequence" if isinstance(spec, PreferenceLoss) else spec.mean
    if mean == "Token":
        return [1.0 / sum(lengths)] * len(lengths)
    if mean == "Sequence":
        return [1.0 / (len(lengths) * n) for n in lengths]
    assert isinstance(spec, Averaged) and spec.length is not None, "checked by the specification"
    return [1.0 / (len(lengths) * spec.length)] * len(lengths)
