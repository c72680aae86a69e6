"""Which factors of a weight an adapter starts from: s·B0·A0 is what has to be taken away from W again.

W = U Σ Vᵀ, `[out, in]`, singular values descending; _r: the r largest, _{−r}: the r smallest; s: the adapter's scale.

| kind | B0 `[out, r]` | A0 `[r, in]` | source |
| --- | --- | --- | --- |
| PiSSA | U_r (Σ_r / s)^½ | (Σ_r / s)^½ V_rᵀ | arXiv:2404.02948 |
| MiLoRA | U_{−r} (Σ_{−r} / s)^½ | (Σ_{−r} / s)^½ V_{−r}ᵀ | arXiv:2406.09044 |
| OLoRA | Q_r | R_r, of W = QR | arXiv:2406.01775 |
| OLoRATail | U_{−r} | V_{−r}ᵀ | arXiv:2606.02437 |
| MiCA | U_{−r}, which never trains | 0 | arXiv:2604.01694 |

By the division PiSSA's residual W − s·B0·A0 lacks exactly the r largest singular values, and MiLoRA's exactly the r
smallest, whatever the scale (as in PEFT and in MiLoRA's own code). OLoRA and OLoRA-tail take s times an orthonormal
product away (as in PEFT and in Megatron-LM).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from allele.protocol.initialisation import InitKind
from allele.store.factors import Decomposition, Factors
from allele_trainer.initialisation.decompositions import decompose

DECOMPOSITIONS: Mapping[InitKind, Decomposition] = {
    "PiSSA": "Largest",
    "MiLoRA": "Smallest",
    "OLoRA": "QR",
    "OLoRATail": "Smallest",
    "MiCA": "Smallest",
}
"""Of each kind that starts from the base."""


def factors(weight: Tensor, *, kind: InitKind, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B0 `[out, r]` and A0 `[r, in]` of a weight `[out, in]`, fp32."""
    return started(decompose(weight, DECOMPOSITIONS[kind], rank), kind=kind, scale=scale)


def started(found: Factors, *, kind: InitKind, scale: float) -> tuple[Tensor, Tensor]:
    """B0 and A0 of a weight's factors, fp32."""
    left, values, right = (torch.tensor(a, dtype=torch.float64) for a in (found.left, found.values, found.right))
    if kind in ("PiSSA", "MiLoRA"):
        root = (values / scale).sqrt()
        left, right = left * root, root[:, None] * right
    elif kind == "MiCA":
        right = torch.zeros_like(right)
    return left.float(), right.float()
