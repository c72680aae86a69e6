"""From rewards to the advantages of tokens, where a member's whole batch decides: REINFORCE++.

Everything is worked out from recorded numbers, in fp64 on the host, before the first forward with adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EPSILON = 1e-8
"""Added to the variance, as in OpenRLHF and verl."""


def whitened(
    rewards: Sequence[float],
    lengths: Sequence[int],
    *,
    distances: Sequence[npt.NDArray[np.float32]] | None = None,
    coefficient: float = 0.0,
) -> list[Floats]:
    """Advantages `[length]` of each of a member's completions: arXiv:2501.03262, eq. 5 to 7.

    A_t = R − coefficient·Σ_{i ≥ t} d_i, then mean 0 and deviation 1 (n − 1) over all tokens of the member. `distances`:
    log π_r − log π_base of each completion's tokens.
    """
    returns = [np.full(n, r, np.float64) for r, n in zip(rewards, lengths, strict=True)]
    if distances is not None:
        returns = [
            a - coefficient * np.cumsum(d[::-1].astype(np.float64))[::-1]
            for a, d in zip(returns, distances, strict=True)
        ]
    every = np.concatenate(returns)
    deviation = np.sqrt(every.var(ddof=1) + EPSILON) if every.size > 1 else 1.0
    return [(a - every.mean()) / deviation for a in returns]
