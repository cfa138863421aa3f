"""FlattenGPT: make a LLaMA/Qwen shallower by turning depth into width, then cutting the width.

Neighbouring blocks read almost the same input. So let them read exactly the same one:

    one after the other    x1 = x + A1(x)   x2 = x1 + M1(x1)   x3 = x2 + A2(x2)   y = x3 + M2(x3)
    side by side           x' = x + A1(x) + A2(x)              y ~ x' + M1(x') + M2(x')

A is a block's attention and M its MLP, each with its norm. The second line is one block with the
heads and channels of both.

1. measure   S, how alike the inputs of the blocks are               calibrate.py  measure
2. group     join, again and again, the neighbours most alike        flatten.py    select_groups
3. flatten   fold the norms, concatenate the blocks of a group       flatten.py    flatten_blocks
4. prune     keep the best heads and channels, fold in the others    prune.py      prune_heads,
                                                                                   prune_channels

Start reading at merge_groups, which takes steps 3 and 4 through the model, group by group. Then
read `paper`, which says what these steps call, and the functions above them. From "what a run
reports" on the file is printing and options. The result is an ordinary checkpoint with fewer
blocks. Paper: FlattenGPT, arXiv 2602.08858.

    python flatten.py                                         flatten the bundled checkpoint
    python flatten.py --ckpt PATH --ratio 0.2                 flatten a model, compare perplexity
    python flatten.py --ckpt PATH --ratio 0.2 --keep-wide     stop after step 3
    python flatten.py --ckpt WIDE                             do step 4 on what --keep-wide wrote
"""
import argparse
import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import console
import parallel
from calibrate import SAMPLE, TOGETHER, measure, read_tokens, windows_measured
from checkpoint.config import Config, read_json
from checkpoint.reader import Checkpoint, Weights
from checkpoint.writer import Writer, check_output
from console import forecast, progress
from console.options import (
    DTYPES,
    PAPER,
    add_run_options,
    compute_dtype,
    defaults,
    describe_run,
)
from console.page import page
from console.picture import add_picture_options, check_pictures, draw
from console.report import explain, row
from evaluate import compare, probe, relative_error, sample, through, too_long, windows_of
from model import Runner, check_finite, embed, sum_dtype
from prune import of_block, prune_attention, prune_channels, prune_heads, prune_mlp
from text.tokenizer import load_tokenizer
from text.wikitext import PYTHON, SELF, find, held_out_text

BUNDLED = Path(__file__).parent / "demo" / "checkpoint"
QUICK_WINDOWS = 64  # of held-out text judge the quick start
PROMPT = "The function returns"  # what --report lets both models go on from, code or English
SHOWN_WIDTHS = 4    # --dry-run shows the memory of groups up to this size, or --max-group
SETTINGS = {"samples", "length", "seed", "ridge", "data", "dtype"}  # step 4 takes these from step 3
READS = {"input_layernorm.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight",
                                    "self_attn.v_proj.weight"),
         "post_attention_layernorm.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")}
WRITES = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # joined at their inputs
Halves = tuple[Callable, Callable]  # merge_attention and merge_mlp, see merge_groups


# ---- step 2: which blocks

def merges_for_ratio(config: Config, ratio: float, max_group: int) -> int:
    """Count the merges (blocks removed) that are needed to remove `ratio` of all parameters.

    The smallest number that removes at least this share; embeddings and head count. ValueError
    outside (0, 1), or if groups of max_group blocks cannot remove that much; it names the most
    merges that are possible, and their share.
    """
    if not 0 < ratio < 1:
        raise ValueError("--ratio is the fraction of all parameters to remove, between 0 and 1; "
                         f"got {ratio} (for 20 % write 0.2)")
    most = mergeable([[i] for i in range(config.num_hidden_layers)], max_group)
    share = config.block_parameters() / config.parameters()
    for merges in range(1, most + 1):
        if merges * share >= ratio:
            return merges
    reachable = (config.num_hidden_layers - 1) * share >= ratio
    larger = ("; larger groups reach it (--max-group, and for the fit --group-by similarity)"
              if reachable else "")
    raise ValueError(f"--ratio {ratio} is out of reach: {config.num_hidden_layers} blocks in "
                     f"groups of at most {max_group} allow {most} merges, which remove "
                     f"{most * share:.4f} of all parameters{larger}")


def mergeable(groups: list[list[int]], max_group: int) -> int:
    """Count how many more merges of neighbours are possible in groups of at most max_group blocks.

    Packs the groups from left to right into bins of at most max_group blocks; a group that is too
    large already gets a bin of its own. Each bin can become one group. So a bin of k groups allows
    k - 1 merges: [0] [1] [2] in groups of at most 2 make the bins [0 1] [2], which allow one.
    """
    bins, room = 0, 0
    for group in groups:
        if len(group) > room:
            bins, room = bins + 1, max(max_group, len(group))
        room -= len(group)
    return len(groups) - bins


def select_groups(S: Tensor, merges: int, max_group: int) -> list[list[int]]:
    """Choose which blocks to join, from their similarities S (L, L). Returns all L blocks, grouped.

    `merges` times, join the two neighbouring groups whose *ends* are most alike (paper Alg. 1). The
    similarity of groups P, Q is S[first of P, last of Q]: [2, 3] and [4] have S[2, 4]. So a long
    group must be alike across its whole span. (The paper says the same in other words: a merge of
    (l-1, l) deletes column l-1 and row l of S.) A merge is passed over if max_group would then make
    the remaining ones impossible. Ties go to the first.
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


# ---- step 3: depth becomes width

def fold_norms(block: Weights) -> Weights:
    """Move the norms' weights into the projections that read them; the norms become ones.

    W diag(a) reads x/rms(x) as W reads a * x/rms(x).
    See paper section 3.2. The product is taken in float32 or better. Biases come after it and stay;
    q_norm and k_norm act on heads and stay. `block` itself does not change.
    """
    folded = dict(block)
    for norm, readers in READS.items():
        a = block[norm].to(sum_dtype(block[norm].dtype))
        folded |= {name: (block[name].to(a.dtype) * a).to(block[name].dtype) for name in readers}
        folded[norm] = torch.ones_like(block[norm])
    return folded


def flatten_blocks(blocks: list[Weights]) -> Weights:
    """Join any number of blocks into one whose attention and MLP are the sums of theirs.

    That holds for any input (paper Eqs. 7-11). Heads and channels are laid member after member,
    query heads and KV heads alike, so every query keeps its keys. The members' norms are folded
    first. One block alone comes back as it is.
    """
    if len(blocks) == 1:
        return blocks[0]
    blocks = [fold_norms(block) for block in blocks]
    wide = {}
    for name, tensor in blocks[0].items():
        members = [block[name] for block in blocks]
        wide[name] = tensor if name in READS else torch.cat(members, dim=1 if name in WRITES else 0)
    return wide


# ---- steps 3 and 4, through the whole model

def merge_groups(source, groups: list[list[int]], xs: Tensor, runner: Runner,
                 merge_attention: Callable, merge_mlp: Callable) -> Iterator[tuple[Weights, dict]]:
    """Make one block of each group. Yields the blocks in order, each with what it kept.

    source.block(i) returns the weights of block i. xs (N, T, C) is the stream that enters the first
    group: N windows of T tokens. It passes through every new block, in place, so each group is
    merged on what the compressed model will feed it.

    A merge has two halves, and `paper` returns the paper's. merge_attention(members, xs) makes one
    block of the members and cuts its heads. merge_mlp(block, xs) cuts that block's MLP. Each
    returns the block and what it kept. ValueError, naming the group, if a weight or a statistic of
    the text becomes NaN or infinite, or if processes that work together choose differently.
    """
    parallel.agree(groups, "groups")
    for group in groups:
        with console.naming(f"blocks {group}"):
            members = [source.block(i) for i in group]
            block, heads = merge_attention(members, xs)
            runner.attend(block, xs)
            block, channels = merge_mlp(block, xs)       # judged on what the kept heads write
            runner.feed(block, xs)                       # the next group sees the compressed model
            check_finite(block, "the merged block", runner.device)
            parallel.agree([heads.get("kv_heads"), channels.get("channels")], "heads or channels")
        yield block, heads | channels


def paper(runner: Runner, ridge: float, **options) -> Halves:
    """Return the halves of the paper's merge, see merge_groups.

    `ridge` is in mean eigenvalues of C, see prune.py. `options` are those of prune_channels.
    """
    def attention(members: list[Weights], xs: Tensor) -> tuple[Weights, dict]:
        return prune_heads(flatten_blocks(members), xs, runner)

    def mlp(block: Weights, xs: Tensor) -> tuple[Weights, dict]:
        return prune_channels(block, xs, runner, ridge, **options)
    return attention, mlp


def keep_wide() -> Halves:
    """Return the halves of a merge that only flattens: nothing is pruned."""
    return lambda members, xs: (flatten_blocks(members), {}), lambda block, xs: (block, {})


# ---- what a run reports

def with_errors(merge_attention: Callable, merge_mlp: Callable, runner: Runner) -> Halves:
    """Return halves of the same merge, whose reports also hold the errors of the merged block."""
    group = {}  # at hand: its members, what it kept, and a few windows of the stream that enters it

    def attention(members: list[Weights], xs: Tensor) -> tuple[Weights, dict]:
        group.update(members=members, start=probe(xs))
        block, group["heads"] = merge_attention(members, xs)
        return block, group["heads"]

    def mlp(block: Weights, xs: Tensor) -> tuple[Weights, dict]:
        block, channels = merge_mlp(block, xs)
        kept = group["heads"] | channels
        return block, channels | errors(group["members"], block, kept, group["start"], runner)
    return attention, mlp


def errors(members: list[Weights], block: Weights, kept: dict, start: Tensor,
           runner: Runner) -> dict:
    """Measure the errors of a block that was made of the members, on the streams `start` (n, T, C).

    They are relative errors of three blocks: the wide one ("flattened"), the wide one cut to what
    was kept ("selected"), and the final one, into which the dropped channels are folded
    ("compensated"). A block that was not touched has none.
    """
    wide, made = flatten_blocks(members), {}
    if len(members) > 1:
        made["flattened"] = wide
    if "channels" in kept:
        made |= {"selected": selection(wide, kept, runner.config), "compensated": block}
    if not made:
        return {}
    target = through(members, start, runner)
    return {f"error_{name}": relative_error(through([weights], start, runner), target, start)
            for name, weights in made.items()}


def selection(wide: Weights, kept: dict, config: Config) -> Weights:
    """Cut a wide block to the heads and channels that were kept, and fold nothing in."""
    block = prune_attention(wide, of_block(kept["kv_heads"], config.num_key_value_heads), config)
    channels = of_block(kept["channels"], config.intermediate_size)
    return prune_mlp(block, channels, block["mlp.down_proj.weight"][:, channels])


def new_reports(groups: list[list[int]], S: Tensor, damage: dict | None = None) -> list[dict]:
    """Start the report of each group: its blocks, how alike its ends are, its damage if known.

    damage[first, last] is that of a group of these blocks, see beyond/grouping.py.
    """
    return [{"blocks": group, "similarity": float(S[group[0], group[-1]])}
            | ({"damage": damage[group[0], group[-1]]} if damage and len(group) > 1 else {})
            for group in groups]


def tell(blocks: Iterator[tuple[Weights, dict]], source: Checkpoint, groups: list[list[int]],
         reports: list[dict]) -> Iterator[Weights]:
    """Pass on all blocks, complete their reports, and print a line about each merged one.

    `groups` are of the source's blocks; `reports` name those of the dense model, which differ if
    the source is wide.
    """
    last = max((k for k, report in enumerate(reports, 1) if len(report["blocks"]) > 1), default=0)
    merged = zip(reports[:last], blocks, strict=False)
    for report, (block, found) in progress(merged, "merge: groups", last):
        if found:
            report |= found
            print(row(report, source.config))
        yield block
    for group in groups[last:]:  # after the last merge nobody needs the stream: copy the rest
        yield source.block(group[0])


# ---- the command

def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that writes a compressed checkpoint."""
    parser.add_argument("--ckpt", help="checkpoint folder: config.json, *.safetensors, tokenizer")
    parser.add_argument("--ratio", type=float, default=0.2,
                        help="fraction of all parameters to remove (default 0.2)")
    parser.add_argument("--out", type=Path, help="result (default out/NAME-METHOD-RATIO)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--ridge", type=float,
                        help="in mean eigenvalues: the paper's (default 10), or the fit's for one "
                             "feature per token (default 3)")
    parser.add_argument("--max-group", type=int,
                        help="most blocks to join into one (default: no limit, but 3 for groups "
                             "by damage; 2: pairs only)")
    parser.add_argument("--dry-run", action="store_true",
                        help="print what the run would make and take, and end")
    parser.add_argument("--explain", action="store_true", help="say more about what was chosen")
    parser.add_argument("--no-eval", action="store_true",
                        help="do not compare perplexity at the end")
    add_picture_options(parser)
    add_run_options(parser)
    parser.set_defaults(quick=False)


def parse_args() -> argparse.Namespace:
    """Read the options. Without --ckpt they are completed to those of the quick start."""
    parser = console.parser("Flatten neighbouring blocks, then prune to ordinary width.", __doc__)
    add_options(parser)
    parser.add_argument("--keep-wide", action="store_true",
                        help="save the wide blocks, unpruned (our loader only)")
    args = parser.parse_args()
    check_pictures(args)
    if args.ckpt is None:
        quick_start(args)
    return args


def quick_start(args: argparse.Namespace) -> None:
    """Complete the options for the bundled checkpoint. An earlier result of it may be replaced."""
    args.ckpt, args.quick = str(BUNDLED), True
    with contextlib.suppress(ValueError):  # on Windows another drive has no relative path
        args.ckpt = os.path.relpath(BUNDLED)
    defaults(args, {"data": PYTHON, "samples": 64, "length": 256})
    if args.out is None:
        args.out = Path("out") / f"demo-{'wide' if args.keep_wide else 'flat'}-{args.ratio}"
        record = args.out / "flatten.json"
        ours = f"--ckpt {shlex.quote(args.ckpt)} "
        if record.is_file() and ours in str(read_json(record).get("command")):
            args.overwrite = True


def check_flattenable(source: Checkpoint) -> None:
    """ValueError for a checkpoint whose blocks cannot be joined."""
    if source.is_wide:
        raise ValueError(f"{source.path} has been flattened already (--keep-wide); "
                         f"python flatten.py --ckpt {shlex.quote(str(source.path))} does the rest")
    if len(set(source.config.layer_types)) > 1:
        raise ValueError(f"{source.path}/config.json: layer_types mixes sliding and full "
                         "attention; such blocks cannot be joined")


def plan(source: Checkpoint, args: argparse.Namespace, kind: str, ridge: float, memory: Callable,
         largest: int | None = None) -> int:
    """Check what can be known to fail before the long work. Returns the number of merges.

    Completes the options: `kind` is a part of the default output's name, `ridge` the default ridge.
    Groups have at most `largest` blocks, if given, and no more than memory allows: memory(config,
    samples, length, itemsize, width) says what it takes to merge `width` blocks.
    """
    check_flattenable(source)
    defaults(args, {"ridge": ridge})
    given = args.max_group
    if given is not None and not 2 <= given <= (largest or given):
        limit = f" and at most {largest} (with --group-by similarity any)" if largest else ""
        raise ValueError(f"--max-group must be at least 2{limit}; got {given}")
    args.max_group = given or largest
    args.out = args.out or Path("out") / f"{source.name}-{kind}-{args.ratio}"
    if not args.no_eval and set(args.data or []) == {SELF}:
        args.no_eval = True
        print("no perplexity at the end: the model's own text cannot judge it; "
              "python evaluate.py --data FILE can")
    if not args.no_eval and not args.dry_run:
        text, _ = held_out_text(args.data)
        windows_of(torch.tensor(load_tokenizer(source.path).encode(text)), args.length)
    most = args.max_group or source.config.num_hidden_layers
    merges = merges_for_ratio(source.config, args.ratio, most)
    if given is None:
        dtype = compute_dtype(args.dtype, args.device, source.dtype, solves=True)
        windows = len(parallel.share(range(args.samples)))
        group = partial(memory, source.config, windows, args.length, dtype.itemsize)
        wanted = min(most, merges + 1)
        fitting = forecast.largest_group(group, wanted, args.device)
        fitting = int(parallel.whole(torch.tensor([fitting])).min())  # of all processes
        if fitting < wanted:
            args.max_group = fitting
            print(f"the free memory is too little for groups of {fitting + 1} blocks: --max-group "
                  f"{fitting} (another one can be given)")
            return merges_for_ratio(source.config, args.ratio, fitting)
    return merges


def foretell(source: Checkpoint, args: argparse.Namespace, merges: int, memory: Callable,
             passes: int = 2) -> None:
    """Print what a run would make and read, and what each process would hold in memory.

    memory(config, samples, length, itemsize, width) says what it takes to merge `width` blocks.
    """
    check_output(args.out, source.path, args.overwrite)
    for data in set(args.data or []) - {PYTHON, SELF}:
        find(data)
    config, size = source.config, source.size()[1]
    dtype = compute_dtype(args.dtype, args.device, source.dtype, solves=True)
    first, shape = windows_measured(args.samples, args.length), (args.length, dtype.itemsize)
    few, mine = (len(parallel.share(range(n))) for n in (first, args.samples))
    removed = 0 if memory is forecast.flattening else merges * config.block_parameters()
    print(f"{source.path}: {merges} merges, {config.num_hidden_layers} -> "
          f"{config.num_hidden_layers - merges} blocks, {config.parameters():,} -> "
          f"{config.parameters() - removed:,} parameters, ratio "
          f"{removed / config.parameters():.4f} (asked {args.ratio})")
    print(f"one pass of {first} x {args.length} tokens and {passes - 1} of at most {args.samples} "
          f"x {args.length}, each reads every block once: {passes} x {size / 1e6:,.0f} MB")
    if SELF in (args.data or []):
        together = min(args.samples, TOGETHER)
        print(forecast.row("writing text", forecast.writing(config, together, *shape)))
    print(forecast.row("first pass", forecast.measuring(config, few, *shape, SAMPLE)))
    for width in range(2, min(args.max_group or SHOWN_WIDTHS, merges + 1) + 1):
        print(forecast.row(f"{width} blocks", memory(config, mine, *shape, width)))
    print("nothing has been read but the config, and nothing written (--dry-run)")


def start_runner(source: Checkpoint, args: argparse.Namespace, text: str) -> Runner:
    """Make a Runner as the options ask for, and print what is about to happen."""
    dtype = compute_dtype(args.dtype, args.device, source.dtype, solves=True)
    print(f"{source.path}: {source.config.num_hidden_layers} blocks, calibrated on "
          f"{args.samples} x {args.length} tokens of {text}")
    if remark := too_long(source, args.length):
        print(f"{remark} (--length)")
    return Runner(source.config, args.length, args.device, dtype)


def entering(source: Checkpoint, tokens: Tensor, runner: Runner, memory: Callable,
             width: int) -> Tensor:
    """Return the stream (N, T, C) that enters block 0: of tokens (N, T) or this process's share.

    It lies where merges of `width` blocks leave room for it. memory(config, samples, length,
    itemsize, width) says what they take.
    """
    mine = parallel.share(tokens)
    needs = memory(source.config, *mine.shape, runner.dtype.itemsize, width)
    return runner.home(embed(source.outer(), mine, runner.dtype), needs)


def conclude(source: Checkpoint, args: argparse.Namespace, record: dict, S: Tensor) -> None:
    """Print what was written, and the perplexity of the dense model and of the result.

    Also writes what --plot and --report ask for. S (L, L) is what `measure` found.
    """
    print(f"wrote {args.out}: {len(record['groups'])} blocks, {record['parameters_before']:,} -> "
          f"{record['parameters_after']:,} parameters, ratio {record['ratio_reached']:.4f} "
          f"(asked {args.ratio})")
    pair, scores, judged = [source.path, args.out], [], ""
    if args.plot:
        put(args.plot, draw(S, record["groups"], args.plot.suffix[1:].lower()))
    if not args.no_eval:
        text, judged = held_out_text(args.data)
        scores = compare(pair, text, judged, window=args.length,
                         limit=QUICK_WINDOWS if args.quick else None, device=args.device,
                         dtype=args.dtype, stream=True)
        judged += f", windows of {args.length} tokens"
        judged += f", the first {QUICK_WINDOWS} only" if args.quick else ""
    if args.report:
        dtype = compute_dtype(args.dtype, args.device, source.dtype)
        samples = [sample(path, PROMPT, args.device, dtype) for path in pair if scores]
        text = page(record, source.config, args.out.name, draw(S, record["groups"], "svg"), scores,
                    judged, PROMPT, samples)
        put(args.report, text.encode(errors="replace"))
    if args.quick:
        print("next: python -m demo compares each step with dropping as many blocks")


def put(path: Path, data: bytes) -> None:
    """Write a file, and print its name. Of several processes the first does it."""
    if parallel.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"wrote {path}")


def main() -> None:
    args = parse_args()
    source = Checkpoint(args.ckpt)
    if source.is_wide:
        return prune_wide(source, args)
    memory = forecast.flattening if args.keep_wide else forecast.pruning
    merges = plan(source, args, "wide" if args.keep_wide else "flat", PAPER["ridge"], memory)
    if args.dry_run:
        return foretell(source, args, merges, memory)
    with Writer(args.out, source, args.overwrite) as writer:
        tokens, text = read_tokens(source.path, args)                   # (N, T)
        runner = start_runner(source, args, text)
        S = measure(source, tokens, runner).S                           # (L, L)
        groups = select_groups(S, merges, args.max_group or len(S))
        xs = entering(source, tokens, runner, memory, max(map(len, groups)))    # (N, T, C)
        halves = keep_wide() if args.keep_wide else paper(runner, args.ridge)
        blocks = merge_groups(source, groups, xs, runner, *with_errors(*halves, runner))
        reports = new_reports(groups, S)
        for block in tell(blocks, source, groups, reports):
            writer.add(block)
        record = {"method": "FlattenGPT (arXiv 2602.08858)", "ratio_asked": args.ratio,
                  "groups": reports, **describe_run("flatten.py", args, tokens, text, runner.dtype,
                                                    ratio=args.ratio, keep_wide=args.keep_wide)}
        record = writer.finish(groups, record, args.keep_wide)
    if args.keep_wide:
        print("the blocks are wide still: "
              f"python flatten.py --ckpt {shlex.quote(str(args.out))} prunes them")
    if args.explain:
        explain(reports, S, source.config)
    conclude(source, args, record, S)


# ---- step 4 on its own

def read_record(source: Checkpoint) -> dict:
    """Read the flatten.json of a wide checkpoint. ValueError if it does not fit the checkpoint."""
    path = source.path / "flatten.json"
    try:
        record = read_json(path)
        widths = tuple(len(group["blocks"]) for group in record["groups"])
        similarities = [group["similarity"] for group in record["groups"]]
        settings = record["settings"]
        fits = (widths == source.config.widths and settings.keys() >= SETTINGS
                and settings["dtype"] in DTYPES and isinstance(record["command"], str)
                and isinstance(settings["data"], str | list | None) and settings["data"] != []
                and all(isinstance(text, str) for text in settings["data"] or [])
                and all(isinstance(value, float) for value in similarities))
    except (OSError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is missing or not what flatten.py --keep-wide wrote for this "
                         "checkpoint; flatten again")
    return record


def prune_wide(source: Checkpoint, args: argparse.Namespace) -> None:
    """Do step 4 on a checkpoint that was saved after step 3. Its settings are the defaults."""
    for name, unset in (("keep_wide", False), ("ratio", 0.2), ("max_group", None),
                        ("explain", False), ("dry_run", False), ("plot", None), ("report", None)):
        if getattr(args, name) != unset:
            raise ValueError(f"--{name.replace('_', '-')} is for a model that has not been "
                             f"flattened; {source.path} has been")
    record = read_record(source)
    defaults(args, {name: record["settings"][name] for name in SETTINGS})
    out = args.out or Path("out") / f"{source.name}-pruned"
    with Writer(out, source, args.overwrite) as writer:
        tokens, text = read_tokens(source.path, args)
        runner = start_runner(source, args, text)
        check_finite(source.outer(), "outside the blocks")
        xs = entering(source, tokens, runner, forecast.pruning, max(source.config.widths))
        groups = [[i] for i in range(len(source.config.widths))]
        halves = with_errors(*paper(runner, args.ridge), runner)
        blocks = merge_groups(source, groups, xs, runner, *halves)
        for report in record["groups"]:
            report.pop("error_flattened", None)
        for block in tell(blocks, source, groups, record["groups"]):
            writer.add(block)
        record |= {"flatten_command": record["command"], "errors_relative_to": "wide block",
                   **describe_run("flatten.py", args, tokens, text, runner.dtype)}
        record = writer.finish([report["blocks"] for report in record["groups"]], record)
    print(f"wrote {out}: {len(groups)} blocks, {record['parameters_after']:,} parameters; "
          "errors are relative to the wide blocks")


if __name__ == "__main__":
    console.run(main, torchrun="together")
