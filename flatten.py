"""FlattenGPT: compress a LLaMA/Qwen by turning depth into width, then cutting the width (arXiv 2602.08858).

Neighbouring blocks read almost the same input. So let them read exactly the same one:

    one after the other     x1 = x + B1(x),  y = x1 + B2(x1)
    side by side            y ~ x + B1(x) + B2(x)            one block, with the heads and channels of both

1. measure   S, how alike the inputs of the blocks are                         calibrate.py   measure
2. group     join, again and again, the neighbours whose ends are most alike     flatten.py     select_groups
3. flatten   fold the norms, concatenate the blocks of a group                 flatten.py     flatten_blocks
4. prune     keep the best heads and channels, fold in the others              prune.py       prune_block

The result is an ordinary checkpoint with fewer blocks.

    python flatten.py                                           a tour of the method on the bundled checkpoint
    python flatten.py --ckpt PATH --ratio 0.2                   flatten a model; measure it before and after
    python flatten.py --ckpt PATH --ratio 0.2 --keep-wide       stop after step 3
    python flatten.py --ckpt PATH --ratio 0.2 --refit           fit each merged block to the dense model (beyond the paper)
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

import console
from beyond.regression import RIDGE
from calibrate import (
    Runner,
    add_arguments,
    check_finite,
    compute_dtype,
    defaults,
    describe_run,
    embed,
    measure,
    read_tokens,
)
from checkpoint.config import Config
from checkpoint.reader import Checkpoint, Weights
from checkpoint.writer import Writer
from console import progress, run
from evaluate import compare, windows_of
from prune import probe, prune_and_report, prune_block, relative_error, row, through
from text.tokenizer import load_tokenizer
from text.wikitext import held_out_text

READS = {"input_layernorm.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
         "post_attention_layernorm.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")}
WRITES = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # their inputs are joined; of all others the outputs


def merges_for_ratio(config: Config, ratio: float, max_group: int) -> int:
    """The smallest number of merges (blocks removed) that removes at least `ratio` of all parameters.

    Embeddings and head count. ValueError outside (0, 1), or if groups of max_group blocks cannot remove that much.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"--ratio is the fraction of all parameters to remove, between 0 and 1; got {ratio} "
                         "(for 20 % write 0.2)")
    most = mergeable([[i] for i in range(config.num_hidden_layers)], max_group)
    share = config.block_parameters() / config.parameters()
    for merges in range(1, most + 1):
        if merges * share >= ratio:
            return merges
    raise ValueError(f"--ratio {ratio} is out of reach: {config.num_hidden_layers} blocks in groups of at most {max_group} "
                     f"allow {most} merges, which remove {most * share:.4f} of all parameters")


def mergeable(groups: list[list[int]], max_group: int) -> int:
    """How many more merges of neighbours are possible if no group may exceed max_group blocks."""
    bins, room = 0, 0
    for group in groups:
        if len(group) > room:
            bins, room = bins + 1, max(max_group, len(group))
        room -= len(group)
    return len(groups) - bins


def select_groups(S: Tensor, merges: int, max_group: int) -> list[list[int]]:
    """Which blocks to join: `merges` times, the two neighbouring groups whose *ends* are most alike (paper Alg. 1).

    The similarity of groups P, Q is S[first of P, last of Q]: across the whole span, so long groups must earn it. It is
    what remains if each merge of (l-1, l) deletes column l-1 and row l of S (L, L). A merge that would leave too few
    for the rest within max_group is passed over.
    """
    groups = [[i] for i in range(len(S))]
    for left in range(merges, 0, -1):
        options = []
        for p in range(len(groups) - 1):
            merged = [*groups[:p], groups[p] + groups[p + 1], *groups[p + 2:]]
            if len(merged[p]) <= max_group and mergeable(merged, max_group) >= left - 1:
                options.append((float(S[merged[p][0], merged[p][-1]]), -p, merged))
        groups = max(options)[2]
    return groups


def fold_norms(block: Weights) -> Weights:
    """The same block with norms of weight one: W diag(a) reads x/rms(x) as W reads a * x/rms(x) (paper section 3.2).

    The product in float32, or better; biases come after it and stay. q_norm and k_norm act on heads and stay.
    """
    folded = dict(block)
    for norm, readers in READS.items():
        a = block[norm].to(torch.promote_types(block[norm].dtype, torch.float32))
        folded |= {name: (block[name].to(a.dtype) * a).to(block[name].dtype) for name in readers}
        folded[norm] = torch.ones_like(block[norm])
    return folded


def flatten_blocks(blocks: list[Weights]) -> Weights:
    """One block whose attention and MLP are the sums of theirs, for any input (paper Eqs. 7-11). For any number of blocks.

    Heads and channels are laid member after member, query heads and KV heads alike, so every query keeps its keys.
    A single block comes back untouched.
    """
    if len(blocks) == 1:
        return blocks[0]
    blocks = [fold_norms(block) for block in blocks]
    return {name: blocks[0][name] if name in READS else
            torch.cat([block[name] for block in blocks], dim=1 if name in WRITES else 0) for name in blocks[0]}


def check_flattenable(source: Checkpoint) -> None:
    """ValueError for a checkpoint whose blocks cannot be joined."""
    if source.is_wide:
        raise ValueError(f"{source.path} has been flattened already (--keep-wide); prune.py does the rest")
    if len(set(source.config.layer_types)) > 1:
        raise ValueError(f"{source.path}/config.json: layer_types mixes sliding and full attention; such blocks cannot be "
                         "joined")


def compress(members: list[Weights], xs: Tensor, runner: Runner, ridge: float, keep_wide: bool, where: str,
             dense: Tensor | None = None) -> tuple[Weights, dict]:
    """(the block that replaces these, what came of it); the stream xs (N, T, C) passes through it, in place.

    With the stream of the dense model, which passes through the members, the block is fitted to that (beyond/refit.py).
    ValueError, naming `where`, if anything becomes NaN or infinite.
    """
    if len(members) == 1:
        for stream in (xs,) if dense is None or dense is xs else (xs, dense):
            runner.run_block(members[0], stream)
        return members[0], {}
    start = probe(xs)
    if dense is not None:
        from beyond.refit import refit_block  # here, because it calls this file's functions
        weights, found = refit_block(members, xs, dense, runner, where, ridge)
        return weights, found | {"error_refit": relative_error(xs[:len(start)], dense[:len(start)], start)}
    wide = flatten_blocks(members)
    check_finite(wide, where)
    target = through(members, start, runner)
    found = {"error_flattened": relative_error(through([wide], start, runner), target, start)}
    if keep_wide:
        runner.run_block(wide, xs)
        return wide, found
    weights, more = prune_and_report(wide, xs, runner, ridge, start, target, where)
    return weights, found | more


def groups_by_damage(source: Checkpoint, tokens: Tensor, runner: Runner, args: argparse.Namespace, merges: int,
                     max_group: int) -> list[list[int]]:
    """The groups whose merges, tried one by one, change what the model predicts least (beyond/grouping.py)."""
    from beyond import grouping, refit  # here, because refit calls this file's functions

    def make(members: list[Weights], xs: Tensor, dense: Tensor) -> Weights:
        where = f"a trial merge of {len(members)} blocks"
        if args.refit:
            return refit.refit_block(members, xs, dense, runner, where, args.ridge, refit.QUICK)[0]
        return prune_block(flatten_blocks(members), xs, runner, args.ridge, where=where)[0]
    found = grouping.damages(source, tokens, runner, make, merges, max_group)
    return grouping.least_damage(found, source.config.num_hidden_layers, merges)


def explain(groups: list[dict], S: Tensor, config: Config) -> None:
    """Print how the groups came about and what pruning saw."""
    print("\nsimilarity of neighbours' inputs, S[i, i+1]: "
          + " ".join(f"{value:.3f}" for value in S.diagonal(1)))
    for group in groups:
        if "head_scores" not in group:
            continue
        scores = torch.tensor(group["head_scores"]).view(len(group["blocks"]), -1)
        total = len(group["blocks"]) * config.intermediate_size
        print(f"blocks {group['blocks'][0]}-{group['blocks'][-1]}: mean head score of each member "
              f"{' '.join(f'{value:.3g}' for value in scores.mean(1))}; the {total} channels have "
              f"{group['effective_dimension']:.1f} effective dimensions at ridge {group['ridge']:.3g}")
    print("error columns: |y - dense| / |dense - x|, mean over tokens of one calibration window in sixteen. flattened: the "
          "blocks side by side; selected: only the best heads and channels; compensated: the other channels folded in; "
          "refit: fitted, and measured against the stream of the whole dense model, with what earlier groups have lost")


def parse_args() -> argparse.Namespace:
    parser = console.parser("Flatten neighbouring blocks, then prune back to the original width.", __doc__)
    parser.add_argument("--ckpt", help="checkpoint folder: config.json, *.safetensors, tokenizer (default: a tour of the "
                                       "method on the bundled checkpoint)")
    parser.add_argument("--ratio", type=float, default=0.2, help="fraction of all parameters to remove (default 0.2)")
    parser.add_argument("--out", type=Path, help="result (default out/NAME-flat-RATIO, or -refit-, -wide-)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--refit", action="store_true", help="fit each merged block to the dense model's streams")
    parser.add_argument("--group-by", choices=("similarity", "damage"), default="similarity",
                        help="join what is most alike (default, the paper's), or what does least damage when tried (groups "
                             "of at most three)")
    parser.add_argument("--ridge", type=float, help="ridge, in mean eigenvalues (default 10, the paper's; 0.01 with --refit)"
                        )
    parser.add_argument("--max-group", type=int, help="most blocks to join into one (default: no limit; 2 is pairs only)")
    parser.add_argument("--keep-wide", action="store_true", help="save the wide blocks, unpruned (our loader only)")
    parser.add_argument("--explain", action="store_true", help="say more about what was measured and chosen")
    parser.add_argument("--no-eval", action="store_true", help="do not compare perplexity at the end")
    add_arguments(parser)
    args = parser.parse_args()
    if args.max_group is not None and args.max_group < 2:
        raise ValueError(f"--max-group must be at least 2; got {args.max_group}")
    if args.refit and args.keep_wide:
        raise ValueError("--refit chooses and fits heads and channels in one go; it cannot stop before that (--keep-wide)")
    return args


def main() -> None:
    args = parse_args()
    if args.ckpt is None:
        from demo.tour import tour  # here, because the tour calls this file's functions
        return tour(args)
    defaults(args, {"ridge": RIDGE} if args.refit else None)
    source = Checkpoint(args.ckpt)
    check_flattenable(source)
    config, max_group = source.config, args.max_group or source.config.num_hidden_layers
    if args.group_by == "damage":
        from beyond.grouping import LARGEST
        if args.max_group is not None and args.max_group > LARGEST:
            raise ValueError(f"--group-by damage tries groups of at most {LARGEST}; got --max-group {args.max_group}")
        max_group = min(max_group, LARGEST)
    merges = merges_for_ratio(config, args.ratio, max_group)
    kind = "wide" if args.keep_wide else "refit" if args.refit else "flat"
    out = args.out or Path("out") / f"{source.name}-{kind}-{args.ratio}"
    judged = None if args.no_eval else held_out_text(args.data)
    if judged:  # now, not after hours
        windows_of(torch.tensor(load_tokenizer(source.path).encode(judged[0])), args.length)
    with Writer(out, source, args.overwrite) as writer:
        tokens, text = read_tokens(source.path, args)                                # (N, T)
        runner = Runner(source, args.length, args.device, compute_dtype(args.dtype, args.device, source.dtype))
        print(f"{source.path}: {len(config.widths)} blocks, calibrated on {args.samples} x {args.length} tokens of {text}")
        S = measure(source, tokens, runner).S                                        # (L, L)
        chosen = select_groups(S, merges, max_group) if args.group_by == "similarity" else \
            groups_by_damage(source, tokens, runner, args, merges, max_group)
        groups = [{"blocks": blocks, "similarity": float(S[blocks[0], blocks[-1]])} for blocks in chosen]
        xs = embed(source.outer(), tokens, runner.dtype)                             # (N, T, C), enters block 0
        dense = xs if args.refit else None                     # one stream until blocks are first joined
        for group in progress(groups, "flatten and prune: blocks", len(groups)):
            members = [source.block(i) for i in group["blocks"]]
            if dense is xs and len(members) > 1:
                dense = xs.clone()
            where, weights, found = f"blocks {group['blocks']}", members[0], {}
            if merges:                                         # behind the last joined blocks nothing reads the streams
                weights, found = compress(members, xs, runner, args.ridge, args.keep_wide, where, dense)
            merges -= len(members) - 1
            writer.add(weights)
            if found:
                group |= found
                print(row(group, config))
        method = "FlattenGPT (arXiv 2602.08858)" + (", fitted to the dense model" if args.refit else "")
        record = {"method": method, "grouped_by": args.group_by, "ratio_asked": args.ratio, "groups": groups,
                  **describe_run("flatten.py", args, tokens, text, runner, ratio=args.ratio, keep_wide=args.keep_wide,
                                 refit=args.refit, group_by=None if args.group_by == "similarity" else args.group_by)}
        record = writer.finish([group["blocks"] for group in groups], record, args.keep_wide)
    print(f"wrote {out}: {len(groups)} blocks, {record['parameters_before']:,} -> {record['parameters_after']:,} parameters"
          f", ratio {record['ratio_reached']:.4f} (asked {args.ratio})")
    if args.keep_wide:
        print(f"the blocks are wide still: python prune.py --ckpt {out} brings them back to the ordinary width")
    if args.explain:
        explain(groups, S, config)
    if judged:
        compare([args.ckpt, out], *judged, window=args.length, device=args.device, dtype=args.dtype,
                stream=True)


if __name__ == "__main__":
    run(main)
