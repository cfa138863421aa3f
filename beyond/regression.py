"""The least-squares problems of beyond/refit.py, as functions of sums over the calibration text.

A regression z V ~ t is known by A = E[z^T z] (n, n) and B = E[z^T t] (n, C). These are means over
tokens, as large for a long text as for a short one. A ridge pulls each solution towards weights W
that are there already. An argument `factor` is the Cholesky factor of A + ridge I. Everything is
float64. Of A only the lower triangle is ever read.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model import Runner, count, sum_dtype
from prune import absolute_ridge, regularized_cholesky

RIDGE = 3.0   # of every problem here, see ridge_of
STEPS = 64    # channels are eliminated in about this many batches


# ---- sums over the text

@torch.inference_mode()
def means(runner: Runner, streams: Sequence[Tensor], terms: Callable) -> list[Tensor]:
    """Return means over tokens of what Runner.sums adds up, in float64."""
    tokens = count(streams[0])
    return [total.double().div_(tokens) for total in runner.sums(streams, terms)]


def mean_squares(runner: Runner, xs: Tensor, features: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean over tokens of z^2, (n,), for the features z (..., n) of the stream xs."""
    def squares(u: Tensor) -> list:
        z = features(u)
        return [z.to(sum_dtype(z.dtype)).square()]
    return means(runner, [xs], squares)[0]


# ---- solutions

def ridge_of(features: int, xs: Tensor, ridge: float = RIDGE) -> float:
    """Return the ridge for a regression on this many features of the tokens of xs (N, T, C).

    It is ridge * features / tokens, in mean eigenvalues of A = E[z^T z]. The more unknowns there
    are for each token, the less they can be trusted (Hoerl, Kennard and Baldwin 1975).
    """
    return ridge * features / count(xs)


def ridged(A: Tensor, multiple: float) -> tuple[Tensor, float]:
    """Return the Cholesky factor of A + ridge I, and the ridge.

    The ridge is `multiple` mean eigenvalues of A (n, n), or 1 if A is zero.
    """
    ridge = absolute_ridge(A, multiple) or 1.0
    return regularized_cholesky(A, ridge), ridge


def fit(W: Tensor, B: Tensor, factor: Tensor, ridge: float) -> Tensor:
    """Return the V (n, C) that minimises E|z V - t|^2 + ridge |V - W|^2, for W and B (n, C).

    It is V = (A + ridge I)^-1 (B + ridge W).
    """
    return torch.cholesky_solve(B + ridge * W, factor)


def alignment(cross: Tensor, factor: Tensor, ridge: float) -> Tensor:
    """Return the M (C, C) that minimises E|n M - t|^2 + ridge |M - I|^2.

    n is what a member reads after flattening, t what it read in the dense model. cross = E[n^T t],
    and `factor` is that of E[n^T n] + ridge I. M is the identity if n and t are the same. If t is a
    linear image of n, M is exact but for the ridge.
    """
    return fit(torch.eye(len(cross), dtype=cross.dtype, device=cross.device), cross, factor, ridge)


# ---- elimination: which features to do without

def remove(V: Tensor, P: Tensor, rows: Tensor) -> None:
    """Make these rows of V (n, C) zero, and let the others adapt, in place.

    V is what `fit` returns, and P (n, n) is (A + ridge I)^-1. Afterwards V is the best fit by the
    rows that remain, and P the inverse of their part of A + ridge I, with zeros in the removed rows
    and columns. This is the step of the optimal brain surgeon (Hassibi and Stork 1993), for several
    rows at once.
    """
    pivot = regularized_cholesky(P[rows][:, rows], 0.0)
    back, P_rows = P[:, rows], P[rows]
    V.addmm_(back, torch.cholesky_solve(V[rows], pivot), alpha=-1)
    P.addmm_(back, torch.cholesky_solve(P_rows, pivot), alpha=-1)
    V[rows], P[rows], P[:, rows] = 0.0, 0.0, 0.0


def unit_costs(V: Tensor, P: Tensor, units: Tensor) -> Tensor:
    """Return what each unit costs if it alone goes, (u,), for the rows (u, size) of each in V.

    If a unit's rows of V (n, C) become zero and all others adapt, E|z V - t|^2 + ridge |V - W|^2
    grows by its cost. V is the minimum and P (n, n) is (A + ridge I)^-1; both stay as they are. The
    cost of unit j is

        tr(V_j^T [P_jj]^-1 V_j)
    """
    P_own = P[units[:, :, None], units[:, None, :]]                         # (u, size, size)
    return (V[units] * torch.linalg.solve(P_own, V[units])).sum((1, 2))


def eliminate_units(V: Tensor, P: Tensor, size: int, keep: int) -> Tensor:
    """Remove units of `size` rows of V (n, C) until `keep` remain. Returns the units that remain.

    Each time the unit goes that costs least. V and P are those of `remove`, and are changed in
    place.
    """
    left = torch.arange(len(V), device=V.device).view(-1, size)  # the rows of each unit
    while len(left) > keep:
        unit = int(unit_costs(V, P, left).argmin())
        remove(V, P, left[unit])
        left = torch.cat([left[:unit], left[unit + 1:]])
    return left[:, 0].cpu() // size


def cheapest(V: Tensor, P: Tensor, most: int) -> Tensor:
    """Return the first `most` rows that go if rows of V (n, C) are removed one after the other.

    The rule is exact: the row of least cost goes, all others adapt, and so on. The cost of row i is

        |V_i|^2 / P_ii

    V and P (n, n) stay as they are. Instead of V, its products M = V V^T (n, n) are followed,
    because the costs need nothing else.
    """
    M, rows = V @ V.T, torch.arange(0, device=V.device)
    for _ in range(most):
        cost = (M.diagonal() / P.diagonal()).index_fill_(0, rows, torch.inf)  # gone already
        i = cost.argmin(keepdim=True)  # (1,) on the device, which need not wait for us to read it
        rows = torch.cat([rows, i])
        # As row i goes, V becomes V - share V_i (see remove). P changes likewise, and so does
        # M = V V^T, first on its left, then on its right.
        share = P[:, i] / P[i, i]                                           # (n, 1)
        P = P - share * P[i]
        M = M - share * M[i]
        M = M - M[:, i] * share.T
    return rows


def eliminate(V: Tensor, P: Tensor, keep: int, steps: int = STEPS) -> Tensor:
    """Remove rows of V (n, C), many at a time, until `keep` remain. Returns the rows that remain.

    V and P are those of `remove`, but P stays as it is, and of V only the rows that remain mean
    anything afterwards. After some removals the inverse Hessian is P - R^T R. R (removed, n) grows
    by a row for each row that goes, like a Cholesky factor of P whose pivots are chosen on the way.
    So of P - R^T R only the rows that go are ever computed: n r (r + 2 C) flops to remove r of n.
    """
    n, to_remove = len(V), len(V) - keep
    size = -(-to_remove // steps)        # of a batch, rounded up
    R = P.new_empty(to_remove, n)
    diagonal = P.diagonal().clone()      # of P - R^T R
    gone = torch.arange(0, device=V.device)
    while len(gone) < to_remove:
        left = to_remove - len(gone)
        batch, past = min(size, left), R[:len(gone)]

        # Choose the batch by the exact rule, but only among twice as many candidates of least cost.
        cost = (V.norm(dim=1).square() / diagonal).index_fill_(0, gone, torch.inf)
        candidates = cost.argsort()[:min(2 * batch, left + keep)]
        R_c = past[:, candidates]
        P_c = P[candidates][:, candidates] - R_c.T @ R_c
        rows = candidates[cheapest(V[candidates], P_c, batch)]

        # Append to R what makes these rows of P - R^T R zero.
        new = torch.addmm(P[rows], past[:, rows].T, past, alpha=-1)         # (batch, n)
        pivot = regularized_cholesky(new[:, rows], 0.0)
        new = torch.linalg.solve_triangular(pivot, new, upper=False)
        R[len(gone):len(gone) + batch] = new

        # Let the other rows of V adapt.
        change = torch.linalg.solve_triangular(pivot, V[rows], upper=False)
        V.addmm_(new.T, change, alpha=-1)
        diagonal -= new.square().sum(0)
        gone = torch.cat([gone, rows])
    return torch.ones(n, device=V.device).index_fill_(0, gone, 0).nonzero().flatten()


# ---- a problem too large for a matrix

def conjugate_gradients(slope: Tensor, curvature: Callable[[Tensor], Tensor],
                        precondition: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Return the D that `steps` steps reach on the way down <D, H D> / 2 - <D, slope>.

    H is never formed: curvature(D) returns H D. Every step comes closer to the minimum, and as many
    steps as there are unknowns reach it. Stopping early regularises: directions the data barely
    determine stay unchanged. Preconditioned conjugate gradients (Hestenes and Stiefel 1952).
    """
    D, left, before = torch.zeros_like(slope), slope, 1.0  # left: the slope at D
    direction = torch.zeros_like(slope)
    for _ in range(steps):
        step = precondition(left)
        size = float((left * step).sum())
        direction = step + size / before * direction
        bent = curvature(direction)
        bend = float((direction * bent).sum())
        if not (size > 0 and bend > 0):  # at the minimum, or as near as the digits can tell
            break
        length = size / bend
        D, left, before = D + length * direction, left - length * bent, size
    return D
