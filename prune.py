"""Cut a wide block back to the width of an ordinary one: keep the best heads and channels, and repair the MLP.

Heads (paper section 3.3): a head matters as much as it writes, so its score is the size of what it hands to o_proj times
the size of the rows of W_O that read it. The unit is a KV head with its query heads, else grouped-query attention breaks.

Channels: with C = E[psi psi^T] over tokens (psi: what the channels hand to down_proj) and a ridge lambda,

    s_i = [ C (C + lambda I)^-1 ]_ii                                          keep the channels of largest s
    W_down,K  <-  W_down,K + W_down,R C_RK (C_KK + lambda I)^-1               fold the dropped R into the kept K

The ridge leverage s_i is how poorly the other channels can stand in for channel i; the second line (Nystrom) lets them
do so as well as they can.

    python prune.py --ckpt WIDE            prunes a checkpoint that flatten.py --keep-wide has written
"""
from pathlib import Path

import torch
from torch import Tensor

import console
from calibrate import (
    Runner,
    add_arguments,
    check_finite,
    compute_dtype,
    defaults,
    describe_run,
    embed,
    read_tokens,
)
from checkpoint.config import Config, read_json
from checkpoint.reader import Checkpoint, Weights
from checkpoint.writer import Writer
from console import progress, run


def query_heads_of(kv_heads: Tensor, n_rep: int) -> Tensor:
    """Query heads served by these KV heads: KV head j serves j*n_rep .. j*n_rep + n_rep-1, so [1, 2], 4 -> [4..11]."""
    return (kv_heads[:, None] * n_rep + torch.arange(n_rep)).flatten()


def channels_of(heads: Tensor, head_dim: int) -> Tensor:
    """Channels of these heads: rows of q, k, v_proj, columns of o_proj. Never a part: RoPE turns i with i + head_dim/2."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def head_importance(sizes: Tensor, o_proj: Tensor, kv_heads: int) -> Tensor:
    """Score of each KV head with its query heads: sum over their channels c of E|o_c| * |row c of W_O|. -> (KV,)

    sizes (H*D,) is E|o_c|, o the input of o_proj; row c of W_O is column c of o_proj (C, H*D). Paper
    section 3.3, which leaves open how the vector becomes one number and what a KV head scores: both are sums here.
    """
    return (sizes * o_proj.to(sizes).norm(dim=0)).view(kv_heads, -1).sum(1)


def best(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, in ascending order; of equals the first."""
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def keep_kv_heads(scores: Tensor, config: Config) -> Tensor:
    """KV heads to keep of a wide block, as many as an ordinary block has, wherever they are. scores (m*KV,) -> (KV,)

    With norms on queries and keys (Qwen3) all heads of a block share the two norm weights, which cannot be folded into
    anything; heads of two blocks cannot share them. So the heads of the best member stay together.
    """
    n = config.num_key_value_heads
    if config.qk_norm:
        return int(scores.view(-1, n).sum(1).argmax()) * n + torch.arange(n)
    return best(scores, n)


def prune_attention(weights: Weights, kv_heads: Tensor, config: Config) -> Weights:
    """The block with only these KV heads and their query heads; everything else as it was."""
    D = config.head_dim
    queries = query_heads_of(kv_heads, config.num_attention_heads // config.num_key_value_heads)
    keep = {"q": channels_of(queries, D), "k": channels_of(kv_heads, D), "v": channels_of(kv_heads, D)}
    pruned = dict(weights)
    for proj, rows in keep.items():
        for name in {f"self_attn.{proj}_proj.weight", f"self_attn.{proj}_proj.bias"} & weights.keys():
            pruned[name] = weights[name][rows]
    pruned["self_attn.o_proj.weight"] = weights["self_attn.o_proj.weight"][:, keep["q"]]
    if config.qk_norm:
        member = kv_heads[:1] // config.num_key_value_heads
        for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            pruned[name] = weights[name][channels_of(member, D)]
    return pruned


def absolute_ridge(C: Tensor, multiple: float) -> float:
    """lambda = multiple * mean eigenvalue of C (F, F); the paper's limitations section uses the multiple 10."""
    return multiple * float(C.diagonal().double().mean())


def regularized_cholesky(C: Tensor, ridge: float) -> Tensor:
    """Lower triangle of C + ridge I in float64. If rounding makes C indefinite, a trace-sized grain of ridge is added."""
    grain = 1e-12 * float(C.diagonal().double().mean())
    for extra in (0.0, grain, 1e3 * grain, 1e6 * grain):
        A = C.to(torch.float64, copy=True)
        A.diagonal().add_(ridge + extra)
        factor, info = torch.linalg.cholesky_ex(A)
        if int(info) == 0:
            return factor
    raise ValueError("a matrix of calibration statistics is not positive definite to working precision; give more text "
                     "(--samples, --length) or a larger --ridge")


def ridge_leverage(C: Tensor, ridge: float) -> Tensor:
    """s_i = [C (C + ridge I)^-1]_ii = 1 - ridge [(C + ridge I)^-1]_ii, in [0, 1), for C (F, F) -> (F,) in float64.

    Paper section 3.3; printed there with the inverse outside the diagonal, which would keep the weakest channels. All
    zero where C is zero. The sum of s is the effective number of dimensions of psi.
    """
    alive = C.diagonal().double().sign()  # rounding must not lift a channel that never fires above zero
    if ridge == 0:
        return alive
    return alive * (1 - ridge * inverse_diagonal(regularized_cholesky(C, ridge)))


def inverse_diagonal(factor: Tensor, columns: int = 512) -> Tensor:
    """Diagonal of A^-1 for A = factor factor^T, factor (F, F) lower triangular: the column norms of factor^-1, squared.

    A few columns at a time, and of these only the rows from the diagonal on, which are all that is not zero.
    """
    diagonal = []
    for j in range(0, len(factor), columns):
        lower = factor[j:, j:]
        unit = torch.eye(len(lower), min(columns, len(lower)), dtype=factor.dtype, device=factor.device)
        diagonal.append(torch.linalg.solve_triangular(lower, unit, upper=False).square().sum(0))
    return torch.cat(diagonal)


def nystrom_down(W: Tensor, C: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """W_K + W_R C_RK (C_KK + ridge I)^-1: fold the dropped channels into the kept. W (d, F), C (F, F), keep (K,) -> (d, K)

    The minimiser W' of E|W' psi_K - W psi|^2 + ridge |W' - W_K|^2 (paper Lemma 3.1): a large ridge keeps W_K as it is,
    and keeping every channel changes nothing. In float64.
    """
    mask = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    mask[keep] = False
    drop = mask.nonzero().flatten()
    if len(drop) == 0 or not C.diagonal().any():
        return W[:, keep].double()
    to_fold = C[keep][:, drop].double() @ W[:, drop].double().T                        # (K, d)
    return W[:, keep].double() + torch.cholesky_solve(to_fold, regularized_cholesky(C[keep][:, keep], ridge)).T


def prune_mlp(weights: Weights, keep: Tensor, down: Tensor) -> Weights:
    """The block with only these channels, and `down` (C, K) for its down_proj."""
    pruned = {name: weights[name][keep] for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight")}
    return weights | pruned | {"mlp.down_proj.weight": down.to(weights["mlp.down_proj.weight"].dtype)}


def score_heads(wide: Weights, xs: Tensor, runner: Runner, where: str = "the block") -> Tensor:
    """Score of each KV head of a block, on the streams xs (N, T, C) that enter it. ValueError if one is not finite."""
    o_proj, config = wide["self_attn.o_proj.weight"], runner.config
    query_size = config.num_attention_heads // config.num_key_value_heads * config.head_dim  # channels of a KV head
    sizes = runner.head_sums(runner.block(wide), xs).cpu() / (xs.shape[0] * xs.shape[1])
    check_finite({"the head statistics": sizes}, where)
    return head_importance(sizes, o_proj, o_proj.shape[1] // query_size)


def leverage_score(C: Tensor, ridge: float, down: Tensor) -> Tensor:
    """The paper's score of channels, (F,): ridge leverage. Any function of C, ridge and down_proj (d, F) can replace it."""
    return ridge_leverage(C, ridge)


def cut_channels(block: Weights, xs: Tensor, runner: Runner, n: int, ridge: float, where: str = "the block",
                 score=leverage_score) -> tuple[Weights, Weights, dict]:
    """(the block with its n best channels and the others folded in, the same without folding, what was kept).

    xs (N, T, C) are the streams that have passed its attention; they stay as they are. ridge is a multiple of C's mean
    eigenvalue. ValueError if a statistic is not finite.
    """
    C = runner.mlp_gram(runner.block(block), xs) / (xs.shape[0] * xs.shape[1])
    check_finite({"the channel statistics": C}, where)
    lam, down = absolute_ridge(C, ridge), block["mlp.down_proj.weight"].to(C.device)
    scores = score(C, lam, down)
    channels = best(scores, n)
    repaired = nystrom_down(down, C, channels, lam).cpu()
    channels = channels.cpu()
    selected = prune_mlp(block, channels, block["mlp.down_proj.weight"][:, channels])
    pruned = prune_mlp(block, channels, repaired)
    check_finite(pruned, where)
    return pruned, selected, {"channels": channels, "ridge": lam, "effective_dimension": float(scores.sum())}


def prune_block(wide: Weights, xs: Tensor, runner: Runner, ridge: float, compensate: bool = True,
                where: str = "the wide block") -> tuple[Weights, Weights, dict]:
    """(pruned block, the same without compensation, what was kept); the stream xs (N, T, C) passes through the first.

    compensate=False makes the first the same as the second. Heads go first: the MLP is measured on what the remaining
    heads write. ridge is a multiple of C's mean eigenvalue. ValueError, naming `where`, if a
    statistic is NaN or infinite.
    """
    config = runner.config
    scores = score_heads(wide, xs, runner, where)
    width = len(scores) // config.num_key_value_heads
    kv_heads = keep_kv_heads(scores, config)
    weights = prune_attention(wide, kv_heads, config)
    runner.attend(weights, xs)

    pruned, selected, kept = cut_channels(weights, xs, runner, config.intermediate_size, ridge, where)
    pruned = pruned if compensate else selected
    runner.feed(pruned, xs)
    kept |= {"kv_heads": by_member(kv_heads, config.num_key_value_heads, width), "head_scores": scores.tolist(),
             "channels": by_member(kept["channels"], config.intermediate_size, width)}
    return pruned, selected, kept


def by_member(kept: Tensor, size: int, width: int) -> list[list[int]]:
    """Kept indices of a wide block, as indices within each of its `width` members of this size."""
    return [(kept[kept // size == member] - member * size).tolist() for member in range(width)]


def relative_error(output: Tensor, target: Tensor, start: Tensor) -> float:
    """Mean over tokens of |output - target| / |target - start|: the error relative to what should have been added.

    All three are streams (N, T, C): after the block under test, after the blocks it stands for, before both. Tokens to
    which those add nothing do not count.
    """
    error, change = ((a.double() - b.double()).norm(dim=-1) for a, b in ((output, target), (target, start)))
    return float((error / change)[change > 0].mean().nan_to_num())


def through(blocks: list[Weights], xs: Tensor, runner: Runner) -> Tensor:
    """The streams xs (N, T, C) after these blocks, one after the other."""
    ys = xs.clone()
    for weights in blocks:
        runner.run_block(weights, ys)
    return ys


def probe(xs: Tensor) -> Tensor:
    """A copy of the first sixteenth of the windows, on which errors are reported: cheap, and enough to see."""
    return xs[:max(1, len(xs) // 16)].clone()


def prune_and_report(wide: Weights, xs: Tensor, runner: Runner, ridge: float, start: Tensor, target: Tensor, where: str,
                     ) -> tuple[Weights, dict]:
    """prune_block, with the errors for flatten.json: `target` is what `start`, a probe of xs, should have become."""
    pruned, selected, kept = prune_block(wide, xs, runner, ridge, where=where)
    return pruned, kept | {"error_selected": relative_error(through([selected], start, runner), target, start),
                           "error_compensated": relative_error(xs[:len(start)], target, start)}


def row(group: dict, config: Config) -> str:
    """One line about a group: what was joined, what each member kept, and the errors that came of it."""
    first, last = group["blocks"][0], group["blocks"][-1]
    text = f"blocks {first}-{last}   similarity {group['similarity']:.3f}"
    if "kv_heads" in group:
        n_rep = config.num_attention_heads // config.num_key_value_heads
        text += f"   heads {'+'.join(str(len(member) * n_rep) for member in group['kv_heads'])}" \
                f"   channels {'+'.join(str(len(member)) for member in group['channels'])}"
        text += " (q_norm, k_norm: attention of one member, whole)" if config.qk_norm else ""
    errors = [f"{name} {group[f'error_{name}']:.1%}" for name in ("flattened", "selected", "compensated", "refit")
              if f"error_{name}" in group]
    return f"{text}   error: {', '.join(errors)}"


def read_record(source: Checkpoint) -> dict:
    """The flatten.json of a wide checkpoint; ValueError if it is missing or does not fit the checkpoint."""
    path = source.path / "flatten.json"
    try:
        record = read_json(path)
        widths = tuple(len(group["blocks"]) for group in record["groups"])
        fits = widths == source.config.widths and isinstance(record["settings"] | {"command": record["command"]}, dict) \
            and all(isinstance(group["similarity"], float) for group in record["groups"])
    except (OSError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is missing or not what flatten.py --keep-wide wrote for this checkpoint; flatten again")
    return record


def main() -> None:
    parser = console.parser("Prune a wide checkpoint back to ordinary width.", __doc__)
    parser.add_argument("--ckpt", required=True, help="folder written by flatten.py --keep-wide")
    parser.add_argument("--out", type=Path, help="result (default out/NAME-pruned)")
    parser.add_argument("--ridge", type=float, help="ridge, in mean eigenvalues of C (default: as recorded, else 10)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    add_arguments(parser)
    args = parser.parse_args()

    source = Checkpoint(args.ckpt)
    if not source.is_wide:
        raise ValueError(f"{args.ckpt} has blocks of ordinary width; prune.py takes what flatten.py --keep-wide writes")
    record = read_record(source)
    defaults(args, record["settings"])
    out = args.out or Path("out") / f"{source.name}-pruned"
    with Writer(out, source, args.overwrite) as writer:
        tokens, text = read_tokens(source.path, args)
        runner = Runner(source, args.length, args.device, compute_dtype(args.dtype, args.device, source.dtype))
        print(f"{source.path}: {len(source.config.widths)} blocks, calibrated on {args.samples} x {args.length} tokens of "
              f"{text}; errors are relative to the wide block")
        check_finite(source.outer(), "outside the blocks")
        xs = embed(source.outer(), tokens, runner.dtype)
        for i, group in progress(enumerate(record["groups"]), "prune: blocks", len(record["groups"])):
            weights = source.block(i)
            check_finite(weights, f"block {i}")
            if source.config.widths[i] == 1:
                runner.run_block(weights, xs)
            else:
                start = probe(xs)
                target = through([weights], start, runner)
                weights, found = prune_and_report(weights, xs, runner, args.ridge, start, target, f"block {i}")
                group.pop("error_flattened", None)
                group |= {"errors_relative_to": "wide block", **found}
                print(row(group, source.config))
            writer.add(weights)
        record |= {"flatten_command": record["command"], **describe_run("prune.py", args, tokens, text, runner)}
        record = writer.finish([group["blocks"] for group in record["groups"]], record)
    print(f"wrote {out}: {record['parameters_after']:,} parameters")


if __name__ == "__main__":
    run(main)
