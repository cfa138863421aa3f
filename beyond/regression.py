"""The least-squares problems of beyond/refit.py, as functions of sums over the calibration text.

A regression z V ~ t is known by A = E[z^T z] (n, n) and B = E[z^T t] (n, C), means over tokens, whatever the text's length.
Each is pulled towards weights W that are there already by a ridge; `factor` is always the Cholesky factor of A + ridge I.
All is float64. Of A only the lower triangle is ever read.
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

    If a and b are one tensor, only the lower triangle is right: what lies above the diagonal is not computed.
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
    return [total.double().div_(tokens) for total in totals]


def mean_squares(runner: Runner, xs: Tensor, features_of: Callable) -> Tensor:
    """Mean over tokens of z^2, (n,), for the features z (..., n) that features_of makes of a batch of xs."""
    dtype = sum_dtype(runner.dtype)
    return mean_products(runner, [xs], lambda u: [(torch.ones_like(u[..., :1]), features_of(u).to(dtype).square())])[0][0]


def ridged(A: Tensor, multiple: float = RIDGE) -> tuple[Tensor, float]:
    """(the Cholesky factor of A + ridge I, ridge): so many mean eigenvalues of A (n, n), or 1 if A is zero."""
    ridge = absolute_ridge(A, multiple) or 1.0
    return regularized_cholesky(A, ridge), ridge


def fit(W: Tensor, B: Tensor, factor: Tensor, ridge: float) -> Tensor:
    """V = (A + ridge I)^-1 (B + ridge W), which minimises E|z V - t|^2 + ridge |V - W|^2; W and B (n, C)."""
    return torch.cholesky_solve(B + ridge * W, factor)


def alignment(cross: Tensor, factor: Tensor, ridge: float) -> Tensor:
    """M (C, C) that minimises E|n M - t|^2 + ridge |M - I|^2, from cross = E[n^T t] and the factor of E[n^T n] + ridge I.

    n is what a member reads after flattening, t what it read in the dense model. M is the identity if the two are the same,
    and exact, but for the ridge, if t is a linear image of n.
    """
    return fit(torch.eye(len(cross), dtype=cross.dtype, device=cross.device), cross, factor, ridge)


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


def cheapest(V: Tensor, P: Tensor, count: int) -> list[int]:
    """Rows of V (n, C) that go first: `count` times the one of least |V_i|^2 / P_ii, after which all others adapt.

    The exact greedy rule, without changing V or P (n, n): their products V V^T and P are enough to follow it.
    """
    M, rows = V @ V.T, []
    for _ in range(count):
        cost = M.diagonal() / P.diagonal()
        cost[rows] = torch.inf
        i = int(cost.argmin())
        rows.append(i)
        column = P[:, i] / P[i, i]
        P, M = P - torch.outer(column, P[i]), M - torch.outer(column, M[i])
        M = M - torch.outer(M[:, i], column)
    return rows


def eliminate(V: Tensor, P: Tensor, keep: int, steps: int = STEPS) -> Tensor:
    """eliminate_units for single rows, many at a time: n r (r + 2 C) flops to remove r of n. Returns the rows that remain.

    P - R^T R is the inverse Hessian of what remains: R (removed, n) grows like a Cholesky factor of P whose pivots are
    chosen on the way, so only rows that go are ever computed. A batch is chosen by the exact rule, but among the twice as
    many candidates of least cost. Batches of one row are the exact rule. P stays as it is; of V, changed in place, only
    the rows that remain mean anything.
    """
    R, diagonal, gone = P.new_empty(len(V) - keep, len(V)), P.diagonal().clone(), torch.arange(0, device=V.device)
    while (left := len(V) - keep - len(gone)) > 0:
        batch, past = min(-(-len(R) // steps), left), R[:len(gone)]
        cost = (V.norm(dim=1).square() / diagonal).index_fill_(0, gone, torch.inf)
        nearest = cost.argsort()[:min(2 * batch, left + keep)]
        near = past[:, nearest]
        rows = nearest[cheapest(V[nearest], P[nearest][:, nearest] - near.T @ near, batch)]
        new = torch.addmm(P[rows], past[:, rows].T, past, alpha=-1)
        factor = regularized_cholesky(new[:, rows], 0.0)
        new = torch.linalg.solve_triangular(factor, new, upper=False)
        R[len(gone):len(gone) + batch] = new
        V.addmm_(new.T, torch.linalg.solve_triangular(factor, V[rows], upper=False), alpha=-1)
        diagonal -= new.square().sum(0)
        gone = torch.cat([gone, rows])
    return torch.ones(len(V), device=V.device).index_fill_(0, gone, 0).nonzero().flatten()


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
