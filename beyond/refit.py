"""Flatten to the dense model: repair what flattening and pruning lose, without training.

The dense model's stream travels beside the compressed one, and every merged block is fitted to it:
first its attention, by o_proj, in these four steps, then its MLP, by down_proj, in the same ones.
docs/beyond.md has the formulas. u is the stream that the members share, x_l what member l reads in
the dense model, and N the norm without its weight, which is folded into the projections.

1. align       Each member's projections read N(u) through the matrix that brings it nearest to the
               member's own N(x_l).
2. eliminate   o_proj is fitted to what the stream lacks already and what the members' attentions
               add in the dense model. (down_proj: to what the stream then lacks of the dense one
               that leaves the group.) Then heads (channels) go, each time the one that the others
               can best replace if they are fitted again. Of the channels, those that write least
               go before that, until half again as many are left as will stay.
3. values      What stays gets new values. With its pattern fixed a head is linear in v_proj; with
               its gate fixed a channel is linear in up_proj.
4. again       o_proj (down_proj) is fitted once more, to the new values, on all of the text and
               with a larger ridge.

All problems are least squares (beyond/regression.py). They are solved exactly, except for step 3,
which takes a few conjugate-gradient steps. Elimination is greedy. No parameter is added.

Start reading at Fit.attention and Fit.fit_heads; Fit.mlp and Fit.fit_channels are like them.

    python -m beyond.refit --ckpt PATH --ratio 0.2      groups by what merging them does
    python -m beyond.refit --ckpt PATH --ratio 0.2 --group-by similarity
                                                        as in the paper, which is faster
"""
import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import console
import parallel
from beyond.grouping import LARGEST, Damage, damages, evenly, least_damage, split
from beyond.regression import (
    RIDGE,
    alignment,
    conjugate_gradients,
    eliminate,
    eliminate_units,
    fit,
    mean_squares,
    means,
    ridge_of,
    ridged,
)
from calibrate import measure, read_tokens
from checkpoint.config import Config
from checkpoint.reader import Checkpoint, Weights
from checkpoint.writer import Writer
from console.forecast import BATCH_TOKENS, flattening, stream
from console.options import describe_run
from console.picture import check_pictures
from console.report import explain
from evaluate import probe, relative_error
from flatten import (
    READS,
    add_options,
    conclude,
    entering,
    flatten_blocks,
    fold_norms,
    foretell,
    keep_wide,
    merge_groups,
    new_reports,
    plan,
    select_groups,
    start_runner,
    tell,
)
from model import (
    MLP,
    Attention,
    Block,
    RMSNorm,
    Runner,
    check_finite,
    move,
    sum_dtype,
)
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
FIT = "the fit"  # where a number that is not finite came up
FEW = 32         # windows for steps 1 to 3; only step 4 sees all
ENOUGH = 2**14   # tokens, at most, of these windows for the shortlist and for new values
SHORTLIST = 1.5  # times the channels that stay are compared in step 2; the rest goes at once
VALUE_STEPS = 2  # conjugate-gradient steps for new values
AGAIN = 3        # times the ridge in step 4: what it pulls to was fitted on this text already
V_PROJ, O_PROJ = "self_attn.v_proj.weight", "self_attn.o_proj.weight"
UP_PROJ, DOWN_PROJ = "mlp.up_proj.weight", "mlp.down_proj.weight"


def few(xs: Tensor, tokens: int | None = None) -> Tensor:
    """Copy FEW of the windows of xs (N, T, ...), evenly spread, or all if there are fewer.

    The copy holds at most `tokens` tokens, but always one window.
    """
    N = parallel.total(len(xs))
    chosen = set(evenly(N, min(FEW, max(1, tokens // xs.shape[1]) if tokens else FEW)))
    mine = [k for k, i in enumerate(parallel.share(range(N))) if i in chosen]
    return xs[torch.tensor(mine, dtype=torch.long)]


def stored(V: Tensor, like: Tensor) -> Tensor:
    """Turn V (n, C) into the weight of a linear layer, (C, n), with the dtype of `like`."""
    return V.T.to(like.device, like.dtype).contiguous()


def precise(weights: Weights, runner: Runner) -> Block:
    """Make a block on the device, in float32 or better."""
    return Block(move(weights, runner.device, sum_dtype(runner.dtype)), runner.config)


@torch.inference_mode()
def attend_and_add(weights: Weights, xs: Tensor, total: Tensor, runner: Runner) -> None:
    """Add the block's attention on xs to xs and to `total`, both in place.

    In a narrow dtype xs loses digits of what is added; `total` keeps them.
    """
    block = runner.block(weights)
    for rows, (x,) in runner.batches(xs):
        update = block.attend(x, runner.rope)
        xs[rows].copy_(x + update, non_blocking=True)
        total[rows] += update.to(total.device)


# ---- step 1: read the shared stream as if it were one's own

def read_through(block: Weights, names: tuple[str, ...], M: Tensor) -> Weights:
    """Let the named projections (out, C) of a block read n M where they read n. Biases stay."""
    return block | {name: (block[name].to(M.device).double() @ M.T).to(block[name])
                    for name in names}


# ---- step 2: what stays

def head_features(weights: Weights, runner: Runner) -> Callable[[Tensor], Tensor]:
    """Return the function from a stream (B, T, C) to what heads hand to o_proj, (B, T, H*D)."""
    block = runner.block(weights)
    return lambda x: block.self_attn.heads(block.input_layernorm(x), runner.rope)


def channel_features(weights: Weights, runner: Runner) -> Callable[[Tensor], Tensor]:
    """Return the function from a stream (B, T, C) to what channels hand on, psi (B, T, F)."""
    block = runner.block(weights)
    return lambda x: block.mlp.channels(block.post_attention_layernorm(x))


def choose_heads(V: Tensor, P: Tensor, size: int, keep: int, together: bool,
                 eliminator: Callable) -> Tensor:
    """Choose the `keep` KV heads that stay, each with `size` rows of V.

    `eliminator` is eliminate_units, or what takes its place. `together`: only all heads of one
    member may stay, because of Qwen3's norms on queries and keys.
    """
    if not together:
        return eliminator(V, P, size, keep)
    member = int(eliminator(V, P, size * keep, 1))
    return torch.arange(member * keep, (member + 1) * keep)


# ---- step 3: new values

def mix_heads(attention: Attention, n: Tensor,
              rope: tuple[Tensor, Tensor]) -> tuple[Callable, Callable, Callable]:
    """Make three functions of attention whose patterns are fixed: those that n (B, T, C) causes.

        mix(v)        what attention adds, (B, T, C), if its values are v (B, T, KV*D)
        unmix(r)      the adjoint of mix, which is linear: <mix(v), r> = <v, unmix(r)>
        overlaps()    products of the patterns of the k query heads that share a KV head,
                      (B, KV*k*k), summed over each window

    They hold H T^2 numbers for each window, and twice as many for a moment.
    """
    q, k, _ = attention.project(n, rope)
    (B, KV, T, D), o_proj = k.shape, attention.o_proj.weight
    q, k = q.unflatten(1, (KV, -1)), k[:, :, None]                      # (B, KV, H/KV or 1, T, D)
    scores = q @ k.transpose(-1, -2) / D ** 0.5                         # (B, KV, H/KV, T, T)
    later = torch.ones(T, T, dtype=torch.bool, device=n.device).triu(1)
    pattern = scores.masked_fill_(later, -torch.inf).softmax(-1)

    def mix(v: Tensor) -> Tensor:
        v = v.view(B, T, KV, 1, D).permute(0, 2, 3, 1, 4)               # (B, KV, 1, T, D)
        heads = pattern @ v                                             # (B, KV, H/KV, T, D)
        return heads.permute(0, 3, 1, 2, 4).flatten(2) @ o_proj.T       # (B, T, C)

    def unmix(r: Tensor) -> Tensor:
        heads = (r @ o_proj).unflatten(2, (KV, -1, D)).permute(0, 2, 3, 1, 4)
        v = (pattern.transpose(-1, -2) @ heads).sum(2)                  # (B, KV, T, D)
        return v.transpose(1, 2).flatten(2)                             # (B, T, KV*D)

    def overlaps() -> Tensor:
        flat = pattern.flatten(-2)                                      # (B, KV, H/KV, T*T)
        return (flat @ flat.transpose(-1, -2)).flatten(1)
    return mix, unmix, overlaps


def mix_channels(mlp: MLP, n: Tensor) -> tuple[Callable, Callable, Callable]:
    """Make the functions of mix_heads for an MLP with fixed gates: those that n (B, T, C) causes.

    Its values v (B, T, F) are up_proj's outputs. A channel shares its value with no other, so
    overlaps() are the squares of the gates, summed over each window, (B, F).
    """
    gate, down_proj = F.silu(mlp.gate_proj(n)), mlp.down_proj.weight

    def mix(v: Tensor) -> Tensor:
        return (gate * v) @ down_proj.T

    def unmix(r: Tensor) -> Tensor:
        return gate * (r @ down_proj)

    def overlaps() -> Tensor:
        return gate.square().sum(1)
    return mix, unmix, overlaps


def own_curvature(writes: Tensor, overlaps: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of each unit's own curvature of the loss, (U, d, d).

    A unit is a KV head, whose d values k query heads hand on, or a channel (k = d = 1). Its
    curvature says what errors in its values cost, if those at different tokens are independent.
    `writes` is the weight of o_proj or down_proj, (C, U*k*d) for U units. overlaps (U, k, k) is
    what the mixer returns, per token. The ridge is at least 1e-4: less would be lost in the digits
    of the overlaps.
    """
    rows = writes.double().T.view(*overlaps.shape[:2], -1, len(writes))     # (U, k, d, C)
    curvature = torch.einsum("ukl,ukdc,ulec->ude", overlaps, rows, rows)
    mean = float(curvature.diagonal(dim1=1, dim2=2).mean())
    curvature.diagonal(dim1=1, dim2=2).add_(max(ridge, 1e-4) * mean or 1.0)
    return torch.linalg.cholesky(curvature)


def new_values(proj: torch.nn.Linear, writes: torch.nn.Linear, xs: Tensor, target: Tensor,
               norm: RMSNorm, mixer: Callable, runner: Runner, ridge: float,
               steps: int = VALUE_STEPS) -> Tensor:
    """Return a weight (out, C) for `proj` (v_proj or up_proj) that lowers E|mix(proj(n)) - t|^2.

    Here n = norm(x), and x and t are the streams xs and target (N, T, C). mixer(n), which is
    mix_heads or mix_channels, makes mix; mix ends with `writes` (o_proj or down_proj). The steps
    are conjugate gradients, preconditioned by E[n^T n] for the inputs and by own_curvature for the
    values. Everything is in float32 or better: differences of patterns do not survive less.
    """
    dtype = sum_dtype(runner.dtype)

    def start(u: Tensor, t: Tensor) -> list:
        mix, unmix, overlaps = mixer(n := norm(u.to(dtype)))
        return [(unmix(t - mix(proj(n))), n), (n, n), overlaps()]

    def curvature(D: Tensor) -> Tensor:
        def products(u: Tensor) -> list:
            mix, unmix, _ = mixer(n := norm(u.to(dtype)))
            return [(unmix(mix(n @ D.T.to(dtype))), n)]
        return means(runner, [xs], products)[0]
    slope, G, overlaps = means(runner, [xs, target], start)
    sharing = writes.in_features // proj.out_features  # query heads of one value, or 1 channel
    overlaps = overlaps.view(-1, sharing, sharing)
    value_factors = own_curvature(writes.weight.detach(), overlaps, ridge)
    input_factor, _ = ridged(G, ridge)

    def precondition(D: Tensor) -> Tensor:
        D = D.view(*value_factors.shape[:2], -1)                            # (U, d, C)
        D = torch.cholesky_solve(D, value_factors).flatten(0, 1)            # (out, C)
        return torch.cholesky_solve(D.T, input_factor).T
    change = conjugate_gradients(slope, curvature, precondition, steps)
    return proj.weight.detach().double() + change


# ---- all steps: the fit of a group

class Fit:
    """The fit. Its methods `attention` and `mlp` are the halves that flatten.merge_groups takes.

    `dense` (N, T, C) is the dense model's stream; it passes through the members of every group.
    `parts` names the steps that are done. If one is left out:

        "align"       members read the shared stream as it is
        "eliminate"   the heads and channels that write least go at once
        "values"      v_proj and up_proj stay
        "dense"       the target is what the wide block adds

    Three options are for comparisons. With `first_only` the members after the first are left out,
    and the first is fitted to what all of them add. `keep` asks for other numbers of KV heads and
    channels than the ordinary ones, and needs "eliminate"; a block that is alone is then fitted,
    too. `eliminators` take the place of eliminate_units and eliminate.
    """

    def __init__(self, dense: Tensor, runner: Runner, ridge: float = RIDGE,
                 parts: tuple[str, ...] = PARTS, first_only: bool = False,
                 keep: tuple[int, int] | None = None,
                 eliminators: tuple[Callable, Callable] | None = None):
        self.dense, self.runner, self.ridge, self.parts = dense, runner, ridge, parts
        self.first_only, self.fit_alone, config = first_only, keep is not None, runner.config
        self.keep = keep or (config.num_key_value_heads, config.intermediate_size)
        self.eliminators = eliminators or (eliminate_units, eliminate)
        one = torch.ones(runner.config.hidden_size, dtype=runner.dtype, device=runner.device)
        self.norm = RMSNorm(one, runner.config.rms_norm_eps)
        self.members = []  # blocks of the group at hand
        self.middles = []  # a few windows of what the MLP of each reads in the dense model

    def attention(self, members: list[Weights], xs: Tensor) -> tuple[Weights, dict]:
        """Make one block with fitted attention of ordinary width, and with the members' MLPs.

        Returns it and the heads that it kept. xs (N, T, C) is the stream of the compressed model
        that enters the group.
        """
        runner, inputs = self.runner, []
        self.middles = []
        if len(members) == 1 and not self.fit_alone:
            runner.run_block(members[0], self.dense)
            return members[0], {}
        target = self.lacking(xs)  # and what each member adds
        for member in members:
            inputs.append(few(self.dense))
            attend_and_add(member, self.dense, target, runner)
            self.middles.append(few(self.dense))
            runner.feed(member, self.dense)
        if self.first_only:
            members, inputs, self.middles = members[:1], inputs[:1], self.middles[:1]
        self.members = [fold_norms(member) for member in members]
        self.members = self.aligned("input_layernorm.weight", xs, inputs)
        wide = flatten_blocks(self.members)
        if "dense" not in self.parts:
            target, block = xs.clone(), runner.block(wide)
            runner.update(target, lambda x: block.attend(x, runner.rope))
        weights, heads = self.fit_heads(wide, xs, target)
        of_members = by_member(heads, runner.config.num_key_value_heads, len(members))
        return weights, {"kv_heads": of_members}

    def mlp(self, block: Weights, xs: Tensor) -> tuple[Weights, dict]:
        """Fit the block's MLP at ordinary width. Returns the block and the channels that it kept.

        xs (N, T, C) is the stream that has passed the block's attention.
        """
        runner = self.runner
        if not self.middles:  # the block is alone and stays as it is
            return block, {}
        members = self.aligned("post_attention_layernorm.weight", xs, self.middles)
        wide = block | {name: tensor for name, tensor in flatten_blocks(members).items()
                        if name.startswith("mlp.")}
        members = self.members = []  # freed: they are larger than the wide block, and done with
        target = self.lacking(xs)
        if "dense" not in self.parts:
            target = xs.clone()
            runner.update(target, runner.block(wide).feed)
        weights, channels = self.fit_channels(wide, xs, target)
        of_members = by_member(channels, runner.config.intermediate_size, len(self.middles))
        return weights, {"channels": of_members}

    def lacking(self, xs: Tensor) -> Tensor:
        """Return what the stream xs (N, T, C) lacks of the dense one here, in float32 or better."""
        return self.dense.to(sum_dtype(self.runner.dtype), copy=True).sub_(xs)

    def aligned(self, norm_name: str, xs: Tensor, own: list[Tensor]) -> list[Weights]:
        """Align what reads this norm in the members (step 1). Returns the members.

        xs (N, T, C) is the stream that they share; own[l] holds the few windows that member l had.
        """
        if "align" not in self.parts:
            return self.members

        def terms(u: Tensor, *own: Tensor) -> list:
            n = self.norm(u)
            return [(n, n), *((n, self.norm(x)) for x in own)]
        G, *cross = means(self.runner, [few(xs), *own], terms)
        factor, pull = ridged(G, ridge_of(len(G), own[0], self.ridge))
        return [read_through(member, READS[norm_name], alignment(product, factor, pull))
                for member, product in zip(self.members, cross, strict=True)]

    def fit_heads(self, wide: Weights, xs: Tensor, target: Tensor) -> tuple[Weights, Tensor]:
        """Fit attention of ordinary width to the target (N, T, C), what it should add to xs.

        Steps 2 to 4, of the wide block. Returns the block and its KV heads.
        """
        runner = self.runner
        heads, W = self.heads_that_stay(wide, xs, target)
        weights = prune_attention(wide, heads, runner.config) | {O_PROJ: stored(W, wide[O_PROJ])}
        check_finite(weights, FIT)
        if "values" in self.parts:
            block = precise(weights, runner)
            attention = block.self_attn
            V = self.fitted_values(attention.v_proj, attention.o_proj, xs, target,
                                   block.input_layernorm,
                                   lambda n: mix_heads(attention, n, runner.rope))
            weights[V_PROJ] = stored(V.T, wide[V_PROJ])
        problem = self.regression(head_features(weights, runner), xs, target, "head", AGAIN)
        weights[O_PROJ] = stored(fit(W, *problem), wide[O_PROJ])
        return weights, heads

    def fit_channels(self, wide: Weights, xs: Tensor, target: Tensor) -> tuple[Weights, Tensor]:
        """Fit an MLP of ordinary width to the target (N, T, C), what it should add to xs.

        Steps 2 to 4, of the wide block. Returns the block and its channels.
        """
        runner = self.runner
        channels, W = self.channels_that_stay(wide, xs, target)
        weights = prune_mlp(wide, channels.cpu(), stored(W, wide[DOWN_PROJ]))
        check_finite(weights, FIT)
        if "values" in self.parts:
            block = precise(weights, runner)
            mlp = block.mlp
            V = self.fitted_values(mlp.up_proj, mlp.down_proj, xs, target,
                                   block.post_attention_layernorm, lambda n: mix_channels(mlp, n))
            weights[UP_PROJ] = stored(V.T, wide[UP_PROJ])
        problem = self.regression(channel_features(weights, runner), xs, target, "channel", AGAIN)
        weights[DOWN_PROJ] = stored(fit(W, *problem), wide[DOWN_PROJ])
        return weights, channels.cpu()

    def heads_that_stay(self, wide: Weights, xs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Choose KV heads of the wide block (step 2). Returns them and their rows of o_proj^T.

        After an elimination the rows have been fitted to the target.
        """
        config, (keep, _) = self.runner.config, self.keep
        size = config.n_rep * config.head_dim                               # rows of one KV head
        W = wide[O_PROJ].to(self.runner.device).double().T                  # (H*D, C)
        features = head_features(wide, self.runner)
        if "eliminate" in self.parts:
            B, factor, pull = self.regression(features, few(xs), few(target), "head")
            W = fit(W, B, factor, pull)
            together = config.qk_norm and len(self.members) > 1
            P = torch.cholesky_inverse(factor, out=factor)  # overwritten, for it is large
            heads = choose_heads(W, P, size, keep, together, self.eliminators[0])
        else:
            squares = mean_squares(self.runner, few(xs), features)
            check_finite({"the head statistics": squares}, FIT)
            scores = head_importance(squares.sqrt(), W.T, len(W) // size)
            heads = keep_kv_heads(scores.cpu(), config)
        return heads, W[channels_of(heads, size).to(W.device)]

    def channels_that_stay(self, wide: Weights, xs: Tensor,
                           target: Tensor) -> tuple[Tensor, Tensor]:
        """Choose channels of the wide block (step 2). Returns them and their rows of down_proj^T.

        After an elimination the rows have been fitted to the target.
        """
        _, keep = self.keep
        W = wide[DOWN_PROJ].to(self.runner.device).double().T               # (F, C)
        squares = mean_squares(self.runner, few(xs, ENOUGH), channel_features(wide, self.runner))
        check_finite({"the channel statistics": squares}, FIT)
        compared = min(int(SHORTLIST * keep), len(W)) if "eliminate" in self.parts else keep
        channels = best(squares.sqrt() * W.norm(dim=1), compared)
        W = W[channels]
        if "eliminate" in self.parts:
            shortlisted = prune_mlp(wide, channels.cpu(), stored(W, wide[DOWN_PROJ]))
            features = channel_features(shortlisted, self.runner)
            B, factor, pull = self.regression(features, few(xs), few(target), "channel")
            W, P = fit(W, B, factor, pull), torch.cholesky_inverse(factor, out=factor)
            stay = self.eliminators[1](W, P, keep)
            W, channels = W[stay], channels[stay]
        return channels, W

    def fitted_values(self, proj: torch.nn.Linear, writes: torch.nn.Linear, xs: Tensor,
                      target: Tensor, norm: RMSNorm, mixer: Callable) -> Tensor:
        """Return new_values (step 3) by at most ENOUGH tokens of xs and target (N, T, C)."""
        xs, target = few(xs, ENOUGH), few(target, ENOUGH)
        ridge = ridge_of(proj.in_features, xs, self.ridge)
        return new_values(proj, writes, xs, target, norm, mixer, self.runner, ridge)

    def regression(self, features: Callable[[Tensor], Tensor], xs: Tensor, target: Tensor,
                   unit: str, times: float = 1) -> tuple[Tensor, Tensor, float]:
        """Return what regression.fit takes to fit z = features(x) to t, for streams xs and target.

        That is B = E[z^T t], the Cholesky factor of E[z^T z] + ridge I, and the ridge, which is
        `times` that of ridge_of. ValueError if a number is not finite; it names the `unit`, "head"
        or "channel".
        """
        def terms(u: Tensor, t: Tensor) -> list:
            z = features(u)
            return [(z, z), (z, t)]
        A, B = means(self.runner, [xs, target], terms)
        check_finite({f"the {unit} statistics": A, f"what {unit}s should add": B}, FIT)
        return B, *ridged(A, times * ridge_of(len(A), xs, self.ridge))


def refit_groups(source, groups: list[list[int]], xs: Tensor, runner: Runner, ridge: float = RIDGE,
                 **options) -> Iterator[tuple[Weights, dict]]:
    """Do what flatten.merge_groups does, with the fit. Yields blocks and reports.

    `options` are those of Fit, but not `keep`. A report also holds the error against the dense
    model's stream. Both models are the same below the first group that is merged, so one stream is
    enough there.
    """
    first = next((k for k, group in enumerate(groups) if len(group) > 1), len(groups))
    yield from merge_groups(source, groups[:first], xs, runner, *keep_wide())
    fitted = Fit(xs.clone(), runner, ridge, **options)
    blocks = merge_groups(source, groups[first:], xs, runner, fitted.attention, fitted.mlp)
    for group in groups[first:]:
        start = probe(xs)
        block, report = next(blocks)
        if len(group) > 1:
            n = len(start)
            report["error_refit"] = relative_error(xs[:n], fitted.dense[:n], start)
        yield block, report


def try_merges(source, tokens: Tensor, runner: Runner, merges: int, largest: int = LARGEST,
               ridge: float = RIDGE, **options) -> Damage:
    """Measure the damage of groups that refit_groups would merge with this ridge and these options.

    Groups have at most min(largest, merges + 1) blocks. See grouping.damages.
    """
    def trial(dense: Tensor) -> tuple[Callable, Callable]:
        fitted = Fit(dense, runner, ridge, **options)
        return fitted.attention, fitted.mlp
    largest, mine = min(largest, merges + 1), parallel.share(tokens)
    needs = fitting(source.config, *mine.shape, runner.dtype.itemsize, largest)
    needs["streams of trials"] = (source.config.num_hidden_layers - 1) * stream(
        source.config, *parallel.share(split(tokens)[1]).shape, runner.dtype.itemsize)
    return damages(source, tokens, runner, trial, merges, needs, largest)


# ---- the command

def fitting(config: Config, samples: int, length: int, itemsize: int, width: int) -> dict[str, int]:
    """Return what memory it takes to fit a group of `width` blocks, see console/forecast.py.

        streams         the dense one, the compressed one and, in float32, what is missing
        a few windows   of what enters and leaves each member's attention, and of two streams
        wide block      and the channels of it that are compared
        solve           in float64, two matrices over these channels (or over what all heads hand
                        to o_proj, if that is more) and four of what they write; or, if larger,
                        a batch, or its attention patterns, twice
    """
    kept = min(int(SHORTLIST * config.intermediate_size), width * config.intermediate_size)
    features = max(kept, width * config.num_attention_heads * config.head_dim)
    read = min(max(BATCH_TOKENS, length), samples * length)  # tokens of a batch
    patterns = 2 * config.num_attention_heads * length * read * max(itemsize, 4)
    windows = stream(config, min(FEW, samples), length, itemsize)
    parts = flattening(config, samples, length, itemsize, width)
    batch = parts.pop("batch")
    solve = max(16 * features * (features + 2 * config.hidden_size), patterns, batch)
    parts["wide block"] *= 2
    parts["streams"] = 2 * parts["streams"] + stream(config, samples, length, max(itemsize, 4))
    return parts | {"a few windows": 2 * (width + 1) * windows, "solve": solve}


def parse_args() -> argparse.Namespace:
    parser = console.parser("Flatten a model and fit each merged block to the dense model.",
                            __doc__)
    add_options(parser)
    parser.add_argument("--group-by", choices=("damage", "similarity"), default="damage",
                        help="join what does least damage when tried (the default; groups of at "
                             f"most {LARGEST}), or what is most alike, as in the paper: faster")
    args = parser.parse_args()
    check_pictures(args)
    if args.ckpt is None:
        raise ValueError("--ckpt is missing: the folder of the model to compress")
    return args


def main() -> None:
    args = parse_args()
    source = Checkpoint(args.ckpt)
    by_damage = args.group_by == "damage"
    merges = plan(source, args, "refit", RIDGE, fitting, LARGEST if by_damage else None)
    if args.dry_run:
        passes = 2  # to measure and to merge
        if by_damage:
            largest = min(args.max_group, merges + 1)
            passes += largest - 1  # one for each size of group
            triples = "and half or all of the triples " if largest > 2 else ""
            print(f"first, {source.config.num_hidden_layers - 1} pairs of neighbours {triples}are "
                  "merged for trial, each on little text; not with --group-by similarity")
        return foretell(source, args, merges, fitting, passes)
    with Writer(args.out, source, args.overwrite) as writer:
        tokens, name = read_tokens(source.path, args)            # (N, T)
        runner = start_runner(source, args, name)
        S = measure(source, tokens, runner).S                    # (L, L)
        if by_damage:
            damage = try_merges(source, tokens, runner, merges, args.max_group, args.ridge)
            groups = least_damage(damage, len(S), merges)
        else:
            damage, groups = {}, select_groups(S, merges, args.max_group or len(S))
        xs = entering(source, tokens, runner, fitting, max(map(len, groups)))    # (N, T, C)
        blocks = refit_groups(source, groups, xs, runner, args.ridge)
        reports = new_reports(groups, S, damage)
        for block in tell(blocks, source, groups, reports):
            writer.add(block)
        record = {"method": "FlattenGPT (arXiv 2602.08858), fitted to the dense model",
                  "grouped_by": args.group_by, "ratio_asked": args.ratio, "groups": reports,
                  **describe_run("-m beyond.refit", args, tokens, name, runner.dtype,
                                 ratio=args.ratio, group_by=args.group_by)}
        record = writer.finish(groups, record)
    if args.explain:
        explain(reports, S, source.config)
    conclude(source, args, record, S)


if __name__ == "__main__":
    console.run(main, torchrun="together")
