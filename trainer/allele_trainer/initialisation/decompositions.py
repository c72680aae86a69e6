"""Leading and trailing singular triplets and QR factors of one weight, without a whole SVD.

A weight of a large model takes minutes to decompose, and only a few dozen of its thousands of triplets are wanted. They
are eigenvectors of the Gram matrix of its smaller side, of which LAPACK gives a range alone; a small SVD in the space
they span then gives both sides to full accuracy. A Gram matrix has the squares of the singular values, so one below
1e-7 of the largest drowns in rounding there (and with it the vectors of the other side): such a weight gets the whole
SVD. Everything is in double precision.

Vectors are only known up to a sign, which LAPACK chooses by build and machine: here the component of largest magnitude
of each left vector is positive.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from allele.protocol.errors import InvalidRequest
from allele.store.factors import Decomposition, Factors

_LOST = 1e-7
"""Of the weight's norm: about the square root of what double precision resolves, with some room."""

Array = NDArray[np.float64]


def decompose(weight: Tensor, decomposition: Decomposition, rank: int) -> Factors:
    """Factors of a weight `[out, in]`. Raises InvalidRequest when it has fewer than `rank` of them."""
    most = min(weight.shape)
    if rank > most:
        raise InvalidRequest(f"rank: expected at most {most} for a weight of {tuple(weight.shape)}, found {rank}")
    w = weight.detach().to("cpu", torch.float64).numpy()
    if decomposition == "QR":
        left, values, right = _qr(w, rank)
    else:
        left, values, right = _singular(w, rank, smallest=decomposition == "Smallest")
    signs = _signs(left)
    return Factors(_single(left * signs), _single(values), _single(signs[:, None] * right))


def _qr(w: Array, rank: int) -> tuple[Array, Array, Array]:
    """Householder vectors go from left to right: the first columns of Q are those of the first columns of W."""
    q, _ = np.linalg.qr(w[:, :rank])
    return q, np.ones(rank), q.T @ w


def _singular(w: Array, rank: int, *, smallest: bool) -> tuple[Array, Array, Array]:
    out, into = w.shape
    n = min(out, into)
    gram = w @ w.T if out <= into else w.T @ w
    ends = (0, rank - 1) if smallest else (n - rank, n - 1)
    values, space = scipy.linalg.eigh(gram, subset_by_index=ends)
    if np.sqrt(max(0.0, values[0])) <= _LOST * np.linalg.norm(w):
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        part = slice(n - rank, n) if smallest else slice(rank)
        return u[:, part], s[part], vt[part]
    if out <= into:
        u, s, vt = np.linalg.svd(space.T @ w, full_matrices=False)
        return space @ u, s, vt
    u, s, vt = np.linalg.svd(w @ space, full_matrices=False)
    return u, s, vt @ space.T


def _signs(left: Array) -> Array:
    largest = np.take_along_axis(left, np.abs(left).argmax(0)[None], axis=0)[0]
    return np.where(largest < 0, -1.0, 1.0)


def _single(array: Array) -> NDArray[np.float32]:
    return np.ascontiguousarray(array, dtype=np.float32)
