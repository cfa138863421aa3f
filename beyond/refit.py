"""Flatten to the dense model: repair what flattening loses as well as what pruning loses, in closed form, without training.

The paper approximates twice. The members of a group read one shared stream u instead of their own inputs x_l; and half of
the heads and channels go. Its compensation repairs the second only, towards the wide block's own output. Here the dense
model's streams travel beside the compressed ones, and a merged block is fitted to them:

1. align     each member's projections read N(u) through the linear map that best makes N(x_l) of it       alignment
2. heads     o_proj is fitted to what the dense model's attention adds, and to what the stream lacks already; heads go,
             each time the one that the others can best stand in for when they are fitted again            fit, eliminate
3. align     the same for what the members' MLPs read
4. channels  down_proj is fitted to the dense stream that leaves the group, minus what is there already;
             channels go as heads do                                                                       fit, eliminate

N is the norm without its weight, which has been absorbed. All problems are ridge least squares, pulled towards the weights
as they are; all are solved exactly, in float64. No parameter is added. flatten.py --refit runs this.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from calibrate import Runner, batches, check_finite, sum_dtype
from checkpoint.reader import Weights
from flatten import READS, flatten_blocks, fold_norms
from model import RMSNorm
from prune import (
    absolute_ridge,
    best,
    by_member,
    channels_of,
    head_importance,
    keep_kv_heads,
    prune_attention,
    prune_mlp,
    regularized_cholesky,
    ridge_leverage,
)

RIDGE = 0.01  # of every least-squares problem here, in mean eigenvalues of its matrix
STEPS = 64    # channels are eliminated in about so many batches
PARTS = ("align", "eliminate", "dense")


@torch.inference_mode()
def mean_products(runner: Runner, streams: list[Tensor], pairs_of: Callable) -> list[Tensor]:
    """Mean over tokens of a^T b, (A, B), for each pair (a (..., A), b (..., B)) that pairs_of makes of a batch."""
    totals, tokens, dtype = None, streams[0].shape[0] * streams[0].shape[1], sum_dtype(runner.dtype)
    for rows in batches(streams[0]):
        flat = [(a.flatten(0, -2).to(dtype), b.flatten(0, -2).to(dtype))
                for a, b in pairs_of(*(stream[rows].to(runner.device) for stream in streams))]
        totals = totals or [torch.zeros(a.shape[1], b.shape[1], dtype=dtype, device=a.device) for a, b in flat]
        for total, (a, b) in zip(totals, flat, strict=True):
            total.addmm_(a.T, b)
    return [total.double() / tokens for total in totals]


def alignment(G: Tensor, cross: Tensor, multiple: float = RIDGE) -> Tensor:
    """M (C, C) that minimises E|n M - t|^2 + a |M - I|^2, from G = E[n^T n] and cross = E[n^T t].

    n is what a member reads after flattening, t what it read in the dense model; rows are tokens. M is the identity if the
    two are the same, and exact, but for the ridge, if t is a linear image of n.
    """
    eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
    return eye + torch.cholesky_solve(cross - G, regularized_cholesky(G, absolute_ridge(G, multiple)))


def read_through(block: Weights, names: tuple[str, ...], M: Tensor) -> Weights:
    """The block with the named projections (out, C) reading n M where they read n; biases come later and stay."""
    return block | {name: (block[name].double() @ M.to(block[name].device).T).to(block[name].dtype) for name in names}


def fit(W: Tensor, A: Tensor, B: Tensor, ridge: float) -> Tensor:
    """The minimiser V of E|z V - t|^2 + ridge |V - W|^2, from A = E[z^T z] (n, n), B = E[z^T t] (n, C) and W (n, C)."""
    return W + torch.cholesky_solve(B - A @ W, regularized_cholesky(A, ridge))


def remove(V: Tensor, P: Tensor, rows: Tensor) -> None:
    """Make these rows of V zero and move the others to where a quadratic with inverse Hessian P is then smallest; in place.

    The step of the optimal brain surgeon (Hassibi and Stork 1993), for several rows at once. P becomes the inverse of the
    Hessian of those that remain, its removed rows and columns zero.
    """
    factor = torch.linalg.cholesky(P[rows][:, rows])
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
    batch = -(-(len(V) - keep) // steps) if keep < len(V) else 1
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


def inverse(A: Tensor, ridge: float) -> Tensor:
    """(A + ridge I)^-1 in float64."""
    return torch.cholesky_inverse(regularized_cholesky(A, ridge))


def choose_heads(V: Tensor, P: Tensor, size: int, keep: int, together: bool) -> Tensor:
    """KV heads that stay. `together`: they must be one member's (Qwen3's norms on queries and keys)."""
    if not together:
        return eliminate_units(V, P, size, keep)
    member = int(eliminate_units(V, P, size * keep, 1))
    return torch.arange(member * keep, (member + 1) * keep)


@torch.inference_mode()
def attend_and_add(weights: Weights, xs: Tensor, total: Tensor, runner: Runner) -> None:
    """xs and total, each plus the block's attention on xs, in place. total keeps the digits that a narrow xs loses."""
    block = runner.block(weights)
    for rows in batches(xs):
        x = xs[rows].to(runner.device)
        update = block.attend(x, runner.rope)
        xs[rows] = (x + update).to(xs.device)
        total[rows] += update.to(total.device)


def align(members: list[Weights], norm_name: str, xs: Tensor, own: list[Tensor], norm: RMSNorm, runner: Runner,
          ridge: float) -> list[Weights]:
    """The members with what reads this norm aligned: from the stream xs that they share to the one that each had."""
    G, *cross = mean_products(runner, [xs, *own], lambda u, *x: [(n := norm(u), n), *((n, norm(each)) for each in x)])
    return [read_through(member, READS[norm_name], alignment(G, product, ridge))
            for member, product in zip(members, cross, strict=True)]


def refit_block(members: list[Weights], xs: Tensor, dense: Tensor, runner: Runner, where: str = "the group",
                ridge: float = RIDGE, parts: tuple[str, ...] = PARTS) -> tuple[Weights, dict]:
    """(one block of ordinary width in place of the members, what was kept); both streams (N, T, C) pass on, in place.

    xs is the stream of the compressed model that enters the group, `dense` that of the dense one. `parts` can leave out
    steps: without "align" members read the shared stream as it is; without "eliminate" heads and channels go by size and by
    leverage at once; without "dense" the target is what the wide block adds. ValueError, naming `where`, if anything
    becomes NaN or infinite.
    """
    config, width = runner.config, len(members)
    inputs, middles = [], []
    added = dense.to(sum_dtype(runner.dtype)) - xs  # what xs lacks of the dense stream, and what attention adds to that
    for member in members:
        inputs.append(dense.clone())
        attend_and_add(member, dense, added, runner)
        middles.append(dense.clone())
        runner.feed(member, dense)
    norm = RMSNorm(torch.ones(config.hidden_size, dtype=runner.dtype, device=runner.device), config.rms_norm_eps)
    members = [fold_norms(member) for member in members]
    if "align" in parts:
        members = align(members, "input_layernorm.weight", xs, inputs, norm, runner, ridge)
    del inputs
    wide = flatten_blocks(members)

    attention, keep = runner.block(wide).self_attn, config.num_key_value_heads
    A, B = mean_products(runner, [xs, added], lambda u, t: [(z := attention.heads(norm(u), runner.rope), z), (z, t)])
    check_finite({"the head statistics": A}, where)
    W, size = wide["self_attn.o_proj.weight"].double().T.to(A.device), len(A) // (width * keep)
    if "dense" not in parts:
        B = A @ W
    if "eliminate" in parts:
        V = fit(W, A, B, absolute_ridge(A, ridge))
        heads = choose_heads(V, inverse(A, absolute_ridge(A, ridge)), size, keep, config.qk_norm)
        V = V[channels_of(heads, size).to(A.device)]
    else:
        heads = keep_kv_heads(head_importance(A.diagonal().sqrt(), W.T, width * keep).cpu(), config)
        rows = channels_of(heads, size).to(A.device)
        V = fit(W[rows], A[rows][:, rows], B[rows], absolute_ridge(A, ridge))
    weights = prune_attention(wide, heads, config)
    weights["self_attn.o_proj.weight"] = V.T.to(wide["self_attn.o_proj.weight"].dtype).cpu().contiguous()
    check_finite(weights, where)
    runner.attend(weights, xs)

    if "align" in parts:
        members = align(members, "post_attention_layernorm.weight", xs, middles, norm, runner, ridge)
    mlps = flatten_blocks(members)
    weights |= {name: mlps[name] for name in mlps if name.startswith("mlp.")}
    mlp = runner.block(weights).mlp
    C, B = mean_products(runner, [xs, dense], lambda u, y: [
        (psi := mlp.channels(norm(u)), psi), (psi, y.to(sum_dtype(u.dtype)) - u)])
    check_finite({"the channel statistics": C}, where)
    W = mlps["mlp.down_proj.weight"].double().T.to(C.device)
    if "dense" not in parts:
        B = C @ W
    if "eliminate" in parts:
        V = fit(W, C, B, absolute_ridge(C, ridge))
        channels = eliminate(V, inverse(C, absolute_ridge(C, ridge)), config.intermediate_size)
        V = V[channels]
    else:
        channels = best(ridge_leverage(C, absolute_ridge(C, 10.0)), config.intermediate_size)
        V = fit(W[channels], C[channels][:, channels], B[channels], absolute_ridge(C, ridge))
    weights = prune_mlp(weights, channels.cpu(), V.T.cpu().contiguous())
    check_finite(weights, where)
    runner.feed(weights, xs)
    return weights, {"kv_heads": by_member(heads, keep, width),
                     "channels": by_member(channels.cpu(), config.intermediate_size, width), "ridge": ridge}
