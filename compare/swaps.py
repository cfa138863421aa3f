"""OSSCAR's local search: after an elimination, swap units that stay for units that went.

A regression of the fit (beyond/regression.py) minimises 1/2 <V, H V> - <V, G> over weights V
(n, C). Here H = A + ridge I and G = B + ridge W. Over the rows K alone its least value is

    -1/2 <G_K, V_K>        V_K = H_KK^-1 G_K

Eliminating one unit after the other finds a good K, but a unit that went never comes back. OSSCAR
(arXiv 2403.12983, the local search of its released code) goes on from there: again and again the t
units that are cheapest to lose go out, and of all units outside the t that gain most come in.
"""
import torch
from torch import Tensor

from beyond.regression import eliminate, eliminate_units, unit_costs
from prune import channels_of, regularized_cholesky

ROUNDS = 20             # of swaps, at most
HEADS_AT_ONCE = 5       # in the first round; half as many after a round that gained nothing
CHANNELS_AT_ONCE = 100


def restricted(H: Tensor, G: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the optimal weights V_K (K, C) over these rows, and the Cholesky factor of H_KK."""
    factor = regularized_cholesky(H[rows][:, rows], 0.0)
    return torch.cholesky_solve(G[rows], factor), factor


def gains(H: Tensor, G: Tensor, inside: Tensor, outside: Tensor, size: int) -> Tensor:
    """Return by how much each unit outside would lower the least value if it alone came in.

    For the rows g of a unit this is 1/2 tr(r^T S^-1 r) with S = H_gg - H_gK H_KK^-1 H_Kg and
    r = G_g - H_gK V_K. `inside` are the rows K, `outside` the rows of all units outside.
    """
    V, factor = restricted(H, G, inside)
    H_in = H[inside][:, outside]                                            # (K, outside)
    left = (G[outside] - H_in.T @ V).unflatten(0, (-1, size))               # (units, size, C)
    half = torch.linalg.solve_triangular(factor, H_in, upper=False)
    half = half.T.unflatten(0, (-1, size))                                  # (units, size, K)
    own = outside.unflatten(0, (-1, size))                                  # (units, size)
    S = H[own[:, :, None], own[:, None, :]] - half @ half.mT                # (units, size, size)
    return (left * torch.linalg.solve(S, left)).sum((1, 2)) / 2


def swap_units(H: Tensor, G: Tensor, size: int, stay: Tensor, at_once: int) -> Tensor:
    """Swap units of `size` rows as long as that lowers the least value. Returns those that stay.

    H (n, n) and G (n, C) are those of the module's docstring, and `stay` are the units to start
    from. `at_once` units are swapped in a round. A round that gains nothing is taken back, and the
    next one swaps half as many.
    """
    units, rows = len(H) // size, channels_of(stay, size)
    V, factor = restricted(H, G, rows)
    value, count = float((G[rows] * V).sum()), min(at_once, len(stay), units - len(stay))
    # value is minus twice the least value: it is to grow
    for _ in range(ROUNDS):
        if count == 0:
            break
        inside = torch.arange(len(V), device=V.device).view(-1, size)  # of V, the rows of each unit
        costs = unit_costs(V, torch.cholesky_inverse(factor), inside)
        kept = stay[costs.argsort()[count:].cpu()].sort().values
        out = torch.ones(units, dtype=torch.bool).index_fill_(0, kept, False).nonzero().flatten()
        gain = gains(H, G, channels_of(kept, size), channels_of(out, size), size)
        best = gain.argsort(descending=True)[:count].cpu()
        trial = torch.cat([kept, out[best]]).sort().values
        rows = channels_of(trial, size)
        V_trial, factor_trial = restricted(H, G, rows)
        value_trial = float((G[rows] * V_trial).sum())
        if value_trial > value * (1 + 1e-9):
            stay, V, factor, value = trial, V_trial, factor_trial, value_trial
        else:
            count //= 2
    return stay


def with_swaps(V: Tensor, P: Tensor, size: int, stay: Tensor, at_once: int) -> Tensor:
    """Go on swapping from the units that `stay`. Returns those that stay now.

    V (n, C) and P (n, n) are the optimum over all rows, and the inverse of H. V is changed in
    place: it becomes the optimum over the rows that stay, and zero in the others.
    """
    H = torch.cholesky_inverse(regularized_cholesky(P, 0.0))
    G = H @ V
    stay = swap_units(H, G, size, stay.cpu(), at_once)
    rows = channels_of(stay, size)
    V.zero_()
    V[rows], _ = restricted(H, G, rows)
    return stay


def eliminate_units_and_swap(V: Tensor, P: Tensor, size: int, keep: int) -> Tensor:
    """Do what beyond.regression.eliminate_units does, then swap. P stays as it is."""
    stay = eliminate_units(V.clone(), P.clone(), size, keep)
    return with_swaps(V, P, size, stay, HEADS_AT_ONCE)


def eliminate_and_swap(V: Tensor, P: Tensor, keep: int) -> Tensor:
    """Do what beyond.regression.eliminate does, then swap."""
    stay = eliminate(V.clone(), P, keep)
    return with_swaps(V, P, 1, stay, CHANNELS_AT_ONCE).to(V.device)


SWAPPING = eliminate_units_and_swap, eliminate_and_swap
