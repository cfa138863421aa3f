"""The least-squares problems of beyond/refit.py, as functions of sums over the calibration text.

A regression z V ~ t is known by A = E[z^T z] (n, n) and B = E[z^T t] (n, C), means over tokens, whatever the text's length.
Each is pulled towards weights W that are there already by a ridge; `factor` is always the Cholesky factor of A + ridge I.
All is float64.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from calibrate import Runner, add_gram, batches, sum_dtype
from prune import absolute_ridge, regularized_cholesky

RIDGE = 0.01  # of every problem here, in mean eigenvalues of its matrix
STEPS = 64    # channels are eliminated in about so many batches


@torch.inference_mode()
def mean_products(runner: Runner, streams: list[Tensor], pairs_of: Callable) -> list[Tensor]:
    """Mean over tokens of a^T b, (A, B), for each pair (a (..., A), b (..., B)) that pairs_of makes of a batch.

    If a and b are one tensor, half of the product is computed and mirrored.
    """
    totals, tokens, dtype = None, streams[0].shape[0] * streams[0].shape[1], sum_dtype(runner.dtype)
    for rows in batches(streams[0]):
        pairs = pairs_of(*(stream[rows].to(runner.device) for stream in streams))
        totals = totals or [torch.zeros(a.shape[-1], b.shape[-1], dtype=dtype, device=a.device) for a, b in pairs]
        for total, (a, b) in zip(totals, pairs, strict=True):
            left = a.flatten(0, -2).to(dtype)
            if a is b:
                add_gram(total, left)
            else:
                total.addmm_(left.T, b.flatten(0, -2).to(dtype))
    return [(total.tril() + total.tril(-1).T if a is b else total).double() / tokens
            for total, (a, b) in zip(totals, pairs, strict=True)]


def mean_squares(runner: Runner, xs: Tensor, features_of: Callable) -> Tensor:
    """Mean over tokens of z^2, (n,), for the features z (..., n) that features_of makes of a batch of xs."""
    dtype = sum_dtype(runner.dtype)
    return mean_products(runner, [xs], lambda u: [(torch.ones_like(u[..., :1]), features_of(u).to(dtype).square())])[0][0]


def ridged(A: Tensor, multiple: float = RIDGE) -> Tensor:
    """The Cholesky factor of A + ridge I, with a ridge of so many mean eigenvalues of A (n, n); of I if A is zero."""
    return regularized_cholesky(A, absolute_ridge(A, multiple) or 1.0)


def fit(W: Tensor, A: Tensor, B: Tensor, factor: Tensor) -> Tensor:
    """The minimiser V of E|z V - t|^2 + ridge |V - W|^2, from A, B, the factor of A + ridge I, and W (n, C)."""
    return W + torch.cholesky_solve(B - A @ W, factor)


def alignment(G: Tensor, cross: Tensor, factor: Tensor) -> Tensor:
    """M (C, C) that minimises E|n M - t|^2 + ridge |M - I|^2, from G = E[n^T n], cross = E[n^T t], factor of G + ridge I.

    n is what a member reads after flattening, t what it read in the dense model. M is the identity if the two are the same,
    and exact, but for the ridge, if t is a linear image of n.
    """
    return fit(torch.eye(len(G), dtype=G.dtype, device=G.device), G, cross, factor)


def remove(V: Tensor, P: Tensor, rows: Tensor) -> None:
    """Make these rows of V zero and move the others to where a quadratic with inverse Hessian P is then smallest; in place.

    The step of the optimal brain surgeon (Hassibi and Stork 1993), for several rows at once. P becomes the inverse of the
    Hessian of those that remain, its removed rows and columns zero.
    """
    factor = regularized_cholesky(P[rows][:, rows], 0.0)
    back, P_rows = P[:, rows], P[rows]
    V.addmm_(back, torch.cholesky_solve(V[rows], factor), alpha=-1)
    P.addmm_(back, torch.cholesky_solve(P_rows, factor), alpha=-1)
    V[rows], P[rows], P[:, rows] = 0.0, 0.0, 0.0


def eliminate_units(V: Tensor, P: Tensor, size: int, keep: int) -> Tensor:
    """Remove units of `size` rows of V (n, C), one after the other, each time the one that costs least, until `keep` remain.

    The cost of unit j is tr(V_j^T [P_jj]^-1 V_j), what the quadratic gains although all others adapt. V and P as in
    remove, changed in place. Returns the units that remain.
    """
    left = list(range(len(V) // size))
    while len(left) > keep:
        costs = []
        for unit in left:
            rows = slice(unit * size, (unit + 1) * size)
            costs.append(float((V[rows] * torch.linalg.solve(P[rows, rows], V[rows])).sum()))
        unit = left.pop(costs.index(min(costs)))
        remove(V, P, torch.arange(unit * size, (unit + 1) * size, device=V.device))
    return torch.tensor(left)


def eliminate(V: Tensor, P: Tensor, keep: int, steps: int = STEPS) -> Tensor:
    """eliminate_units for single rows, many at a time: about n^3 flops in all. Returns the rows that remain.

    A batch is chosen among twice as many candidates of least cost, whose costs are kept exact while it is chosen. Batches of
    one row are the exact rule.
    """
    alive = torch.ones(len(V), dtype=torch.bool, device=V.device)
    batch = -(-(len(V) - keep) // steps)
    while (excess := int(alive.sum()) - keep) > 0:
        batch = min(batch, excess)
        cost = V.square().sum(1) / P.diagonal()
        candidates = cost.masked_fill(~alive, torch.inf).argsort()[:min(2 * batch, keep + excess)]
        small_V, small_P, gone = V[candidates], P[candidates][:, candidates], []
        for _ in range(batch):
            local = small_V.square().sum(1) / small_P.diagonal()
            local[gone] = torch.inf
            i = int(local.argmin())
            gone.append(i)
            column = small_P[:, i] / small_P[i, i]
            small_V = small_V - torch.outer(column, small_V[i])
            small_P = small_P - torch.outer(column, small_P[i])
        remove(V, P, candidates[gone])
        alive[candidates[gone]] = False
    return alive.nonzero().flatten()


def conjugate_gradients(slope: Tensor, curvature: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor],
                        steps: int) -> Tensor:
    """D that brings <D, H D> / 2 - <D, slope> down as far as so many steps can; H D = curvature(D), never formed.

    As many steps as unknowns reach the minimum; each step comes closer to it. Fewer are a ridge of their own: directions
    that the data barely know stay as they are. Preconditioned conjugate gradients (Hestenes and Stiefel 1952).
    """
    D, left, direction, before = torch.zeros_like(slope), slope, torch.zeros_like(slope), 1.0
    for _ in range(steps):
        step = precondition(left)
        size = float((left * step).sum())
        direction = step + size / before * direction
        bent = curvature(direction)
        if not (size > 0 and (bend := float((direction * bent).sum())) > 0):  # there already, or beyond what digits can tell
            break
        length = size / bend
        D, left, before = D + length * direction, left - length * bent, size
    return D
