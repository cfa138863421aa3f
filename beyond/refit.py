"""Flatten to the dense model: repair what flattening loses as well as what pruning loses, in closed form, without training.

The paper approximates twice. The members of a group read one shared stream u instead of their own inputs x_l; and half of
the heads and channels go. Its compensation repairs the second only, towards the wide block's own output. Here the dense
model's streams travel beside the compressed ones, and a merged block is fitted to them, attention first, then the MLP:

1. align       each member's projections read N(u) through the linear map that best makes N(x_l) of it      alignment
2. eliminate   o_proj (down_proj) is fitted to what the dense model's attention (the whole group) adds, and
               to what the stream lacks already; heads (channels) go, each time the one that the others
               can best stand in for when they are fitted again; of channels, those that write least
               have gone before that, down to half again as many as stay                                    fit, eliminate
3. values      those that stay get new values: with its pattern fixed a head is linear in v_proj, with its
               gate fixed a channel is linear in up_proj                                                    new_values
4.             and o_proj (down_proj) is fitted to them once more                                           fit

N is the norm without its weight, which has been absorbed. All problems are least squares (beyond/regression.py), solved
exactly but for 3, which takes a few conjugate gradients. Elimination is greedy. No parameter is added. flatten.py --refit
runs this.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from beyond.regression import (
    RIDGE,
    alignment,
    conjugate_gradients,
    eliminate,
    eliminate_units,
    fit,
    mean_products,
    mean_squares,
    ridged,
)
from calibrate import Runner, batches, check_finite, sum_dtype
from checkpoint.reader import Weights
from flatten import READS, flatten_blocks, fold_norms
from model import MLP, Attention, Block, RMSNorm, move
from prune import (
    best,
    by_member,
    channels_of,
    head_importance,
    keep_kv_heads,
    prune_attention,
    prune_mlp,
)

PARTS = ("align", "eliminate", "values", "dense")
QUICK = ("align", "dense")  # enough to find out which blocks to merge
FEW = 32         # windows of calibration text are enough to choose by; only the last fit of a projection sees all
ENOUGH = 2**14   # tokens of these are enough for the shortlist and for new values
SHORTLIST = 1.5  # times as many channels as stay are compared in full; those that write less go at once
VALUE_STEPS = 2  # conjugate gradients for new values
V_PROJ, O_PROJ, UP_PROJ, DOWN_PROJ = ("self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight",
                                      "mlp.down_proj.weight")


def few(xs: Tensor, tokens: int | None = None) -> Tensor:
    """A copy of FEW of the windows of xs (N, T, ...), evenly spread, or of all if there are not more; at most `tokens`."""
    n = min(FEW, len(xs), max(1, tokens // xs.shape[1]) if tokens else FEW)
    return xs[[i * len(xs) // n for i in range(n)]]


def read_through(block: Weights, names: tuple[str, ...], M: Tensor) -> Weights:
    """The block with the named projections (out, C) reading n M where they read n; biases come later and stay."""
    return block | {name: (block[name].to(M.device).double() @ M.T).to(block[name]) for name in names}


def align(members: list[Weights], norm_name: str, xs: Tensor, own: list[Tensor], norm: RMSNorm, runner: Runner,
          ridge: float) -> list[Weights]:
    """The members with what reads this norm aligned: from the stream xs that they share to the few windows each had."""
    G, *cross = mean_products(runner, [few(xs), *own], lambda u, *x: [(n := norm(u), n), *((n, norm(each)) for each in x)])
    factor, pull = ridged(G, ridge)
    return [read_through(member, READS[norm_name], alignment(product, factor, pull))
            for member, product in zip(members, cross, strict=True)]


def choose_heads(V: Tensor, P: Tensor, size: int, keep: int, together: bool) -> Tensor:
    """KV heads that stay. `together`: they must be one member's (Qwen3's norms on queries and keys)."""
    if not together:
        return eliminate_units(V, P, size, keep)
    member = int(eliminate_units(V, P, size * keep, 1))
    return torch.arange(member * keep, (member + 1) * keep)


def mix_heads(attention: Attention, n: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Callable, Callable, Callable]:
    """(mix, unmix, overlaps): mix makes of values (B, T, KV*D) what attention adds (B, T, C), with the patterns n causes.

    mix is linear, unmix its adjoint: <mix(v), r> = <v, unmix(r)>. overlaps() are the products of the patterns of the k heads
    that share values, summed over each window, (B, KV*k*k). Holds H T^2 numbers a window, and for a moment twice as many.
    """
    q, k, _ = attention.project(n, rope)
    (B, KV, T, D), o_proj = k.shape, attention.o_proj.weight
    scores = q.view(B, KV, -1, T, D) @ k[:, :, None].transpose(-1, -2) / D ** 0.5        # (B, KV, H/KV, T, T)
    later = torch.ones(T, T, dtype=torch.bool, device=n.device).triu(1)
    pattern = scores.masked_fill_(later, -torch.inf).softmax(-1)

    def mix(v: Tensor) -> Tensor:
        heads = pattern @ v.view(B, T, KV, 1, D).permute(0, 2, 3, 1, 4)                  # (B, KV, H/KV, T, D)
        return heads.permute(0, 3, 1, 2, 4).flatten(2) @ o_proj.T

    def unmix(r: Tensor) -> Tensor:
        heads = (r @ o_proj).view(B, T, KV, -1, D).permute(0, 2, 3, 1, 4)
        return (pattern.transpose(-1, -2) @ heads).sum(2).transpose(1, 2).flatten(2)

    def overlaps() -> Tensor:
        flat = pattern.flatten(-2)                                                       # (B, KV, H/KV, T T)
        return (flat @ flat.transpose(-1, -2)).flatten(1)
    return mix, unmix, overlaps


def mix_channels(mlp: MLP, n: Tensor) -> tuple[Callable, Callable, Callable]:
    """(mix, unmix, overlaps) as mix_heads: from up_proj's outputs (B, T, F) to what the MLP adds, with the gates n causes.

    A channel shares its value with no other; overlaps() are the squares of the gates, summed over each window, (B, F).
    """
    gate, down_proj = F.silu(mlp.gate_proj(n)), mlp.down_proj.weight
    return lambda v: (gate * v) @ down_proj.T, lambda r: gate * (r @ down_proj), lambda: gate.square().sum(1)


def own_curvature(writes: Tensor, overlaps: Tensor, ridge: float) -> Tensor:
    """Cholesky factors (U, d, d), with a ridge, of what errors in a unit's d values cost if independent at all positions.

    A unit is a KV head, whose values k query heads hand on, or a channel (k = d = 1). writes (C, U*k*d) is o_proj or
    down_proj, overlaps (U, k, k) what the mixer returns, per token. A ridge below 1e-4 would be lost in their digits.
    """
    rows = writes.double().T.view(*overlaps.shape[:2], -1, len(writes))                    # (U, k, d, C)
    curvature = torch.einsum("ukl,ukdc,ulec->ude", overlaps, rows, rows)
    mean = float(curvature.diagonal(dim1=1, dim2=2).mean())
    curvature.diagonal(dim1=1, dim2=2).add_(max(ridge, 1e-4) * mean or 1.0)
    return torch.linalg.cholesky(curvature)


def new_values(proj: torch.nn.Linear, writes: torch.nn.Linear, xs: Tensor, target: Tensor, norm: RMSNorm, mixer: Callable,
               runner: Runner, ridge: float, steps: int = VALUE_STEPS) -> Tensor:
    """A weight (out, C) for proj (v_proj or up_proj) with a lower E|mix(proj(n)) - t|^2, (mix, unmix, overlaps) = mixer(n).

    n = norm(x); x and t are the streams xs and target (N, T, C). `writes` (o_proj, down_proj) is what mix ends with. Steps
    are taken in n whitened by E[n^T n] and in values whitened by own_curvature. All compute in float32 at least:
    differences of patterns do not survive less.
    """
    dtype = sum_dtype(runner.dtype)

    def start(u: Tensor, t: Tensor) -> list:
        mix, unmix, overlaps = mixer(n := norm(u.to(dtype)))
        return [(unmix(t - mix(proj(n))), n), (n, n), (torch.ones_like(n[:, 0, :1]), overlaps())]

    def curvature(D: Tensor) -> Tensor:
        def products(u: Tensor) -> list:
            mix, unmix, _ = mixer(n := norm(u.to(dtype)))
            return [(unmix(mix(n @ D.T.to(dtype))), n)]
        return mean_products(runner, [xs], products)[0]
    slope, G, overlaps = mean_products(runner, [xs, target], start)
    heads = writes.in_features // proj.out_features                                        # that share a value
    value_factors = own_curvature(writes.weight.detach(), overlaps[0].view(-1, heads, heads), ridge)
    input_factor, _ = ridged(G, ridge)

    def precondition(D: Tensor) -> Tensor:
        D = torch.cholesky_solve(D.view(*value_factors.shape[:2], -1), value_factors).flatten(0, 1)
        return torch.cholesky_solve(D.T, input_factor).T
    return proj.weight.detach().double() + conjugate_gradients(slope, curvature, precondition, steps)


def stored(V: Tensor, like: Tensor) -> Tensor:
    """V (n, C) as a weight of a linear layer, (C, n) in the dtype of `like`."""
    return V.T.to(like.device, like.dtype).contiguous()


def precise(weights: Weights, runner: Runner) -> Block:
    """The block on the device, in float32 at least."""
    return Block(move(weights, runner.device, sum_dtype(runner.dtype)), runner.config)


def refit_attention(wide: Weights, xs: Tensor, target: Tensor, runner: Runner, where: str, ridge: float,
                    parts: tuple[str, ...]) -> tuple[Weights, Tensor]:
    """(the wide block with as many heads as an ordinary one, fitted to what target (N, T, C) adds to xs; its KV heads)."""
    config = runner.config

    def heads_of(block: Block, u: Tensor) -> Tensor:
        return block.self_attn.heads(block.input_layernorm(u), runner.rope)

    def products(block: Block, *streams: Tensor) -> list[Tensor]:
        found = mean_products(runner, streams, lambda u, t: [(z := heads_of(block, u), z), (z, t)])
        check_finite(dict(zip(("the head statistics", "what heads should add"), found, strict=True)), where)
        return found
    W, keep, block = wide[O_PROJ].double().T.to(runner.device), config.num_key_value_heads, runner.block(wide)
    size = config.num_attention_heads // keep * config.head_dim
    if "eliminate" in parts:
        A, B = products(block, few(xs), few(target))
        factor, pull = ridged(A, ridge)
        W = fit(W, B, factor, pull)
        heads = choose_heads(W, torch.cholesky_inverse(factor), size, keep, config.qk_norm)
    else:
        squares = mean_squares(runner, few(xs), lambda u: heads_of(block, u))
        check_finite({"the head statistics": squares}, where)
        heads = keep_kv_heads(head_importance(squares.sqrt(), W.T, len(W) // size).cpu(), config)
    W = W[channels_of(heads, size).to(W.device)]
    weights = prune_attention(wide, heads, config) | {O_PROJ: stored(W, wide[O_PROJ])}
    check_finite(weights, where)
    if "values" in parts:
        block = precise(weights, runner)
        attention = block.self_attn
        V = new_values(attention.v_proj, attention.o_proj, few(xs, ENOUGH), few(target, ENOUGH), block.input_layernorm,
                       lambda n: mix_heads(attention, n, runner.rope), runner, ridge)
        weights[V_PROJ] = stored(V.T, wide[V_PROJ])
    A, B = products(runner.block(weights), xs, target)
    weights[O_PROJ] = stored(fit(W, B, *ridged(A, ridge)), wide[O_PROJ])
    check_finite(weights, where)
    return weights, heads


def refit_mlp(wide: Weights, xs: Tensor, target: Tensor, runner: Runner, where: str, ridge: float,
              parts: tuple[str, ...]) -> tuple[Weights, Tensor]:
    """(the block with as many channels as an ordinary one, fitted to what target (N, T, C) adds to xs; its channels)."""
    def channels_at(block: Block, u: Tensor) -> Tensor:
        return block.mlp.channels(block.post_attention_layernorm(u))

    def products(block: Block, *streams: Tensor) -> list[Tensor]:
        found = mean_products(runner, streams, lambda u, t: [(psi := channels_at(block, u), psi), (psi, t)])
        check_finite(dict(zip(("the channel statistics", "what channels should add"), found, strict=True)), where)
        return found
    W, keep, block = wide[DOWN_PROJ].double().T.to(runner.device), runner.config.intermediate_size, runner.block(wide)
    squares = mean_squares(runner, few(xs, ENOUGH), lambda u: channels_at(block, u))
    check_finite({"the channel statistics": squares}, where)
    del block  # large; from here on only some of its channels are run
    compared = min(int(SHORTLIST * keep), len(W)) if "eliminate" in parts else keep
    channels = best(squares.sqrt() * W.norm(dim=1), compared)
    W = W[channels]
    weights = prune_mlp(wide, channels.cpu(), stored(W, wide[DOWN_PROJ]))
    if compared > keep:
        C, B = products(runner.block(weights), few(xs), few(target))
        factor, pull = ridged(C, ridge)
        W, P = fit(W, B, factor, pull), torch.cholesky_inverse(factor)
        del C, factor  # large: of three such matrices only P is needed on
        stay = eliminate(W, P, keep)
        W, channels = W[stay], channels[stay]
        weights = prune_mlp(wide, channels.cpu(), stored(W, wide[DOWN_PROJ]))
    check_finite(weights, where)
    if "values" in parts:
        block = precise(weights, runner)
        mlp = block.mlp
        V = new_values(mlp.up_proj, mlp.down_proj, few(xs, ENOUGH), few(target, ENOUGH), block.post_attention_layernorm,
                       lambda n: mix_channels(mlp, n), runner, ridge)
        weights[UP_PROJ] = stored(V.T, wide[UP_PROJ])
    C, B = products(runner.block(weights), xs, target)
    weights[DOWN_PROJ] = stored(fit(W, B, *ridged(C, ridge)), wide[DOWN_PROJ])
    check_finite(weights, where)
    return weights, channels.cpu()


@torch.inference_mode()
def attend_and_add(weights: Weights, xs: Tensor, total: Tensor, runner: Runner) -> None:
    """xs and total, each plus the block's attention on xs, in place. total keeps the digits that a narrow xs loses."""
    block = runner.block(weights)
    for rows in batches(xs):
        x = xs[rows].to(runner.device)
        update = block.attend(x, runner.rope)
        xs[rows] = (x + update).to(xs.device)
        total[rows] += update.to(total.device)


def refit_block(members: list[Weights], xs: Tensor, dense: Tensor, runner: Runner, where: str = "the group",
                ridge: float = RIDGE, parts: tuple[str, ...] = PARTS) -> tuple[Weights, dict]:
    """(one block of ordinary width in place of the members, what was kept); both streams (N, T, C) pass on, in place.

    xs is the stream of the compressed model that enters the group, `dense` that of the dense one. `parts` can leave out
    steps: without "align" members read the shared stream as it is; without "eliminate" heads and channels go at once, those
    that write least; without "values" v_proj and up_proj stay; without "dense" the target is what the wide block adds.
    ValueError, naming `where`, if anything becomes NaN or infinite.
    """
    config, width = runner.config, len(members)
    norm = RMSNorm(torch.ones(config.hidden_size, dtype=runner.dtype, device=runner.device), config.rms_norm_eps)
    inputs, middles = [], []  # a few windows of what each member read in the dense model
    target = dense.to(sum_dtype(runner.dtype)) - xs  # what xs lacks of the dense stream, and what attention adds to that
    for member in members:
        inputs.append(few(dense))
        attend_and_add(member, dense, target, runner)
        middles.append(few(dense))
        runner.feed(member, dense)
    members = [fold_norms(member) for member in members]

    if "align" in parts:
        members = align(members, "input_layernorm.weight", xs, inputs, norm, runner, ridge)
    del inputs
    wide = flatten_blocks(members)
    if "dense" not in parts:
        target, block = xs.clone(), runner.block(wide)
        runner.update(target, lambda u: block.attend(u, runner.rope))
    weights, heads = refit_attention(wide, xs, target, runner, where, ridge, parts)
    runner.attend(weights, xs)

    if "align" in parts:
        members = align(members, "post_attention_layernorm.weight", xs, middles, norm, runner, ridge)
    wide = weights | {name: tensor for name, tensor in flatten_blocks(members).items() if name.startswith("mlp.")}
    target = dense.to(sum_dtype(runner.dtype)) - xs
    if "dense" not in parts:
        target, block = xs.clone(), runner.block(wide)
        runner.update(target, block.feed)
    weights, channels = refit_mlp(wide, xs, target, runner, where, ridge, parts)
    runner.feed(weights, xs)
    return weights, {"kv_heads": by_member(heads, config.num_key_value_heads, width),
                     "channels": by_member(channels, config.intermediate_size, width)}
