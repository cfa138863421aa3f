"""A tour of the method on the bundled checkpoint: what each step costs, next to simply dropping as many blocks."""
import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

import calibrate
import flatten
from checkpoint.reader import Checkpoint, Weights
from console import progress
from evaluate import losses, windows_of
from model import Transformer, generate, move
from prune import prune_block
from text.tokenizer import load_tokenizer
from text.wikitext import PYTHON, held_out_text

BUNDLED = Path(__file__).parent / "checkpoint"
PROMPT = "    def __init__(self, "
WINDOWS = 64  # of held-out text, evenly spread


def least_influential(similarity: Tensor, n: int) -> list[int]:
    """The n blocks that change the stream least: block influence 1 - cos(input, output) (ShortGPT, arXiv 2403.03853).

    similarity (L+1, L+1) as measured: row i the stream that enters block i, the last row the one that leaves.
    """
    influence = 1 - similarity.diagonal(1)
    return sorted(influence.argsort(stable=True)[:n].tolist())


def compressed(source: Checkpoint, groups: list[list[int]], tokens: Tensor, runner: calibrate.Runner, ridge: float,
               compensate: bool) -> list[Weights]:
    """The blocks after flattening and pruning, each measured on what the compressed blocks before it make."""
    xs, blocks = calibrate.embed(source.outer(), tokens, runner.dtype), []
    for group in progress(groups, "flatten and prune: blocks", len(groups)):
        weights = flatten.flatten_blocks([source.block(i) for i in group])
        if len(group) > 1:
            weights, _, _ = prune_block(weights, xs, runner, ridge, compensate)
        else:
            runner.run_block(weights, xs)
        blocks.append(weights)
    return blocks


def variants(source: Checkpoint, ratio: float, max_group: int | None, ridge: float, tokens: Tensor,
             runner: calibrate.Runner) -> tuple[list[list[int]], dict[str, list[Weights]]]:
    """(the groups, {name: blocks of that model}) of the dense model and of the ways to make it shallower."""
    L, max_group = source.config.num_hidden_layers, max_group or source.config.num_hidden_layers
    merges = flatten.merges_for_ratio(source.config, ratio, max_group)
    found = calibrate.measure(source, tokens, runner)
    groups = flatten.select_groups(found.S, merges, max_group)
    dropped = least_influential(found.similarity, merges)
    return groups, {
        "dense": [source.block(i) for i in range(L)],
        "blocks dropped (ShortGPT)": [source.block(i) for i in range(L) if i not in dropped],
        "flattened only (wide)": [flatten.flatten_blocks([source.block(i) for i in group]) for group in groups],
        "flattened, pruned, not compensated": compressed(source, groups, tokens, runner, ridge, compensate=False),
        "flattened and pruned": compressed(source, groups, tokens, runner, ridge, compensate=True),
    }


def tour(args: argparse.Namespace) -> None:
    """Print the table: parameters, blocks, held-out perplexity and speed of each model; then two samples."""
    if args.out or args.keep_wide or args.overwrite or args.explain or args.no_eval:
        raise ValueError("--out, --keep-wide, --overwrite, --explain and --no-eval need --ckpt (the bundled model is "
                         "demo/checkpoint); without it flatten.py only shows what the method does")
    calibrate.defaults(args, {"data": PYTHON, "samples": 64, "length": 256})
    source, tokenizer = Checkpoint(BUNDLED), load_tokenizer(BUNDLED)
    tokens, text = calibrate.read_tokens(BUNDLED, args)
    dtype = calibrate.compute_dtype(args.dtype, args.device, source.dtype)
    runner = calibrate.Runner(source, args.length, args.device, dtype)
    groups, models = variants(source, args.ratio, args.max_group, args.ridge, tokens, runner)
    judged, name = held_out_text(args.data)
    windows = windows_of(torch.tensor(tokenizer.encode(judged)), args.length)
    windows = windows[::max(1, len(windows) // WINDOWS)][:WINDOWS]
    print(f"the bundled checkpoint, calibrated on {args.samples} x {args.length} tokens of {text}, judged on "
          f"{len(windows)} x {args.length} tokens of {name}")
    print("joined:", ", ".join("+".join(map(str, group)) for group in groups if len(group) > 1), "\n")
    print("| model | parameters | blocks | held-out perplexity | generated tokens/s |\n|---|---|---|---|---|")
    outer, samples = move(source.outer(), args.device, dtype), {}
    prompt = torch.tensor([tokenizer.encode(PROMPT)], device=args.device)
    for label, blocks in models.items():
        net = Transformer(source.config, [runner.block(weights) for weights in blocks], outer).eval().requires_grad_(False)
        score = math.exp(losses(net, windows, args.device).double().mean())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            ids = generate(net, prompt, 64)
            times.append(time.perf_counter() - start)
        samples[label], speed = tokenizer.decode(ids[0].tolist()), 64 / min(times)
        size = sum(tensor.numel() for weights in [*blocks, outer] for tensor in weights.values())
        print(f"| {label} | {size:,} | {len(blocks)} | {score:.3f} | {speed:.0f} |", flush=True)
    for label in ("dense", "flattened and pruned"):
        print(f"\n{label} continues {PROMPT.strip()!r}:\n{samples[label]}")
    print("\nTo write the result as a checkpoint:\n"
          "python flatten.py --ckpt demo/checkpoint --data python --samples 64 --length 256")
