"""Cut a wide block to ordinary width: keep the best heads and channels, and repair the MLP.

Heads (paper section 3.3): a head matters as much as it writes. So its score is the size of what it
hands to o_proj times the size of the rows of W_O that read it. A KV head stays or goes together
with the query heads that it serves.

Channels: psi is what the channels hand to down_proj, C = E[psi psi^T] a mean over the tokens of the
calibration text, and lambda a ridge. (The width of the stream, C in model.py, is d in this file.)

    s_i = [ C (C + lambda I)^-1 ]_ii                                 ridge leverage
    W_down,K  <-  W_down,K + W_down,R C_RK (C_KK + lambda I)^-1      compensation (Nystrom)

The leverage s_i says how poorly the other channels can stand in for channel i. The channels K of
largest s are kept. Compensation then changes what they write, so that they stand in for the dropped
channels R as well as they can.

flatten.py runs this on every block that it has flattened. A checkpoint that was saved before this
step (`flatten.py --keep-wide`) is pruned by `python flatten.py --ckpt WIDE`.
"""
import torch
from torch import Tensor

import console
from checkpoint.config import Config
from checkpoint.reader import Weights
from model import Block, Runner, check_finite, count, symmetric

# ---- heads

def query_heads_of(kv_heads: Tensor, n_rep: int) -> Tensor:
    """Return the query heads that these KV heads serve, `n_rep` each.

    KV head j serves j*n_rep .. j*n_rep + n_rep-1.
    If n_rep is 4, the KV heads [1, 2] serve [4..11].
    """
    return (kv_heads[:, None] * n_rep + torch.arange(n_rep)).flatten()


def channels_of(heads: Tensor, head_dim: int) -> Tensor:
    """Return the channels of these heads: rows of q, k and v_proj, or columns of o_proj.

    A head is kept or dropped as a whole, because RoPE turns channel i with channel i + head_dim/2.
    """
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def head_importance(sizes: Tensor, o_proj: Tensor, kv_heads: int) -> Tensor:
    """Score each KV head together with its query heads, (KV,): how much they write.

        sum over their channels c of E|o_c| |W_O,c|

    sizes (H*D,) is E|o_c|, with o the input of o_proj. W_O,c, row c of W_O, is column c of o_proj
    (d, H*D). Paper section 3.3. It leaves open how the vector becomes one number, and what a KV
    head scores: both are sums here.
    """
    return (sizes * o_proj.to(sizes).norm(dim=0)).view(kv_heads, -1).sum(1)


def best(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores, in ascending order. Ties go to the first."""
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def keep_kv_heads(scores: Tensor, config: Config) -> Tensor:
    """Choose the KV heads of a wide block to keep, from their scores (m*KV,). Returns (KV,).

    These are the best, of whatever member. Norms on queries and keys (Qwen3) are an exception: all
    heads of a block share their weights, and heads of two members cannot. So there all heads of the
    best member stay, and no other.
    """
    n = config.num_key_value_heads
    if config.qk_norm:
        return int(scores.view(-1, n).sum(1).argmax()) * n + torch.arange(n)
    return best(scores, n)


def prune_attention(weights: Weights, kv_heads: Tensor, config: Config) -> Weights:
    """Cut a block to these KV heads and their query heads, biases too. Its MLP stays as it is.

    The norms on queries and keys (Qwen3) become those of the member whose heads stay.
    """
    D = config.head_dim
    queries = query_heads_of(kv_heads, config.n_rep)
    keep = {"q": channels_of(queries, D), "k": channels_of(kv_heads, D),
            "v": channels_of(kv_heads, D)}
    pruned = dict(weights)
    for proj, rows in keep.items():
        for name in (f"self_attn.{proj}_proj.weight", f"self_attn.{proj}_proj.bias"):
            if name in weights:
                pruned[name] = weights[name][rows]
    pruned["self_attn.o_proj.weight"] = weights["self_attn.o_proj.weight"][:, keep["q"]]
    if config.qk_norm:
        member = kv_heads[:1] // config.num_key_value_heads  # whose heads these are
        for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            pruned[name] = weights[name][channels_of(member, D)]
    return pruned


# ---- channels

def absolute_ridge(C: Tensor, multiple: float) -> float:
    """Return lambda = multiple * mean eigenvalue of C (F, F). The paper's multiple is 10."""
    return multiple * float(C.diagonal().double().mean())


def regularized_cholesky(C: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor (lower triangle) of C + ridge I, in float64.

    Rounding can leave C with a negative eigenvalue. Then a little more ridge is added, at most a
    millionth of C's mean eigenvalue.
    """
    grain = 1e-12 * float(C.diagonal().double().mean())
    for extra in (0.0, grain, 1e3 * grain, 1e6 * grain):
        # .mT lays A out by columns, so that cholesky_ex can overwrite it and needs no copy
        A = torch.empty(C.shape, dtype=torch.float64, device=C.device).mT
        A.copy_(C).diagonal().add_(ridge + extra)
        info = torch.empty((), dtype=torch.int32, device=C.device)
        torch.linalg.cholesky_ex(A, out=(A, info))
        if int(info) == 0:
            return A
    raise ValueError("a matrix of calibration statistics is not positive definite to working "
                     "precision; give more text (--samples, --length) or a larger --ridge")


def ridge_leverage(C: Tensor, ridge: float) -> Tensor:
    """Return the ridge leverage of each channel, (F,) in float64, from C (F, F). All in [0, 1].

        s_i = [C (C + ridge I)^-1]_ii = 1 - ridge [(C + ridge I)^-1]_ii

    Paper section 3.3. (There the inverse is printed outside the diagonal, see docs/choices.md.) The
    sum of s is the effective number of dimensions of psi. A channel that never fires has s = 0, and
    rounding must not lift it above that.
    """
    alive = C.diagonal().double().sign()  # 1, or 0 for a channel that never fires
    if ridge == 0:  # also if no channel ever fires: see absolute_ridge
        return alive
    return alive * (1 - ridge * inverse_diagonal(regularized_cholesky(C, ridge)))


def inverse_diagonal(factor: Tensor, columns: int = 256) -> Tensor:
    """Return the diagonal of A^-1, for the lower triangle `factor` (F, F) of A = factor factor^T.

    Its elements are the squared norms of the columns of factor^-1. That overwrites `factor`, for a
    large model would leave no memory for a copy. A few columns are inverted at a time, the last
    ones first: the others need what is below and to the right of them.
    """
    diagonal = torch.empty_like(factor[0])
    for j in reversed(range(0, len(factor), columns)):
        here, start = slice(j, j + columns), j + columns
        unit = torch.eye(len(factor[here])).to(factor)
        inverse = torch.linalg.solve_triangular(factor[here, here], unit, upper=False)
        read = factor[start:, here] @ -inverse                          # (below, columns)
        for i in range(start, len(factor), 2 * columns):  # strips, which end at the diagonal
            stop = i + 2 * columns
            factor[i:stop, here] = factor[i:stop, start:stop] @ read[:stop - start]
        factor[here, here] = inverse
        diagonal[here] = factor[j:, here].square().sum(0)
    return diagonal


def nystrom_down(W: Tensor, C: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """Fold the channels that are dropped into those that are kept. Returns (d, K) in float64.

        W_K + W_R C_RK (C_KK + ridge I)^-1

    W is (d, F), C (F, F), keep (K,). The result is the W' that minimises (paper Lemma 3.1)

        E|W' psi_K - W psi|^2 + ridge |W' - W_K|^2

    So a large ridge leaves W_K as it is, and keeping every channel changes nothing.
    """
    mask = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    mask[keep] = False
    drop = mask.nonzero().flatten()
    W_K = W[:, keep].double()                                               # (d, K)
    if len(drop) == 0 or not C.diagonal().any():
        return W_K
    to_fold = C[keep][:, drop].double() @ W[:, drop].double().T             # (K, d)
    factor = regularized_cholesky(C[keep][:, keep], ridge)                  # (K, K)
    return W_K + torch.cholesky_solve(to_fold, factor).T


def prune_mlp(weights: Weights, keep: Tensor, down: Tensor) -> Weights:
    """Cut a block to these channels, with `down` (d, K) for its down_proj."""
    down = down.to(weights["mlp.down_proj.weight"].dtype)
    gate_and_up = {name: weights[name][keep]
                   for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight")}
    return weights | gate_and_up | {"mlp.down_proj.weight": down}


# ---- both, on the streams of the calibration text

def head_sizes(block: Block, xs: Tensor, runner: Runner) -> Tensor:
    """Return E|o_c| for each channel c that heads hand to o_proj, (H*D,).

    xs (N, T, d) is the stream that enters the block.
    """
    def sizes(x: Tensor) -> list[Tensor]:
        return [block.self_attn.heads(block.input_layernorm(x), runner.rope).abs()]
    return runner.sums([xs], sizes)[0] / count(xs)


@torch.inference_mode()
def channel_covariance(block: Block, xs: Tensor, runner: Runner) -> Tensor:
    """Return C = E[psi psi^T], (F, F). The mean of psi is not subtracted.

    xs (N, T, d) is the stream that has passed the block's attention.
    """
    def products(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        psi = block.mlp.channels(block.post_attention_layernorm(x))
        return [(psi, psi)]
    return symmetric(runner.sums([xs], products)[0]).div_(count(xs))


def score_heads(block: Weights, xs: Tensor, runner: Runner) -> Tensor:
    """Score each KV head of a block on the stream xs (N, T, d) that enters it.

    ValueError if a score is not finite.
    """
    o_proj, config = block["self_attn.o_proj.weight"], runner.config
    kv_heads = o_proj.shape[1] // (config.n_rep * config.head_dim)
    sizes = head_sizes(runner.block(block), xs, runner).cpu()
    check_finite({"the head statistics": sizes}, "the streams")
    return head_importance(sizes, o_proj, kv_heads)


def prune_heads(block: Weights, xs: Tensor, runner: Runner) -> tuple[Weights, dict]:
    """Cut the attention of a wide block to ordinary width. Returns the block and what it kept.

    xs (N, T, d) is the stream that enters the block; it stays as it is. A block of ordinary width
    comes back untouched. ValueError if a statistic is not finite.
    """
    config = runner.config
    ordinary = config.num_key_value_heads * config.head_dim
    width = len(block["self_attn.k_proj.weight"]) // ordinary
    if width == 1:
        return block, {}
    scores = score_heads(block, xs, runner)
    heads = keep_kv_heads(scores, config)
    return prune_attention(block, heads, config), {
        "kv_heads": by_member(heads, config.num_key_value_heads, width),
        "head_scores": scores.tolist()}


def leverage_score(C: Tensor, ridge: float, down: Tensor) -> Tensor:
    """Return the paper's score of channels, (F,): ridge leverage.

    Any function of C, ridge and down_proj (d, F) can stand in its place.
    """
    return ridge_leverage(C, ridge)


def prune_channels(block: Weights, xs: Tensor, runner: Runner, ridge: float,
                   compensate: bool = True, score=leverage_score,
                   keep: int | None = None) -> tuple[Weights, dict]:
    """Cut the MLP of a wide block to ordinary width. Returns the block and what it kept.

    xs (N, T, d) is the stream that has passed the block's attention; it stays as it is. `ridge` is
    in mean eigenvalues of C. The other channels are folded into those that stay, unless
    compensate=False. `keep` asks for another number of channels than the ordinary one. A block of
    that width comes back untouched. ValueError if a statistic is not finite.
    """
    ordinary = runner.config.intermediate_size
    keep = keep or ordinary
    down = block["mlp.down_proj.weight"]                                    # (d, F)
    if down.shape[1] == keep:
        return block, {}
    C = channel_covariance(runner.block(block), xs, runner)                 # (F, F)
    check_finite({"the channel statistics": C}, "the streams")
    lam, down = absolute_ridge(C, ridge), down.to(C.device)
    scores = score(C, lam, down)
    channels = best(scores, keep)
    new_down = nystrom_down(down, C, channels, lam) if compensate else down[:, channels]
    pruned = prune_mlp(block, channels.cpu(), new_down.cpu())
    return pruned, {"channels": by_member(channels.cpu(), ordinary, down.shape[1] // ordinary),
                    "ridge": lam, "effective_dimension": float(scores.sum())}


def by_member(indices: Tensor, size: int, width: int) -> list[list[int]]:
    """Split the indices of a wide block into those of its `width` members of this size."""
    return [(indices[indices // size == member] - member * size).tolist()
            for member in range(width)]


def of_block(by_members: list[list[int]], size: int) -> Tensor:
    """Join the indices that by_member has split. Returns indices of the wide block."""
    return torch.tensor([member * size + i for member, indices in enumerate(by_members)
                         for i in indices])


if __name__ == "__main__":
    console.fail("prune.py holds functions; python flatten.py --ckpt WIDE prunes a wide checkpoint")
