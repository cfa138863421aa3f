"""A tour of the method on the bundled checkpoint: what each step costs, next to simply dropping as many blocks."""
import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

import calibrate
import flatten
from baselines.dropping import shortgpt
from baselines.flattened import flattengpt, groups_of, wide
from baselines.network import Calibration, Network, whole
from checkpoint.reader import Checkpoint
from evaluate import losses, windows_of
from model import generate
from text.tokenizer import load_tokenizer
from text.wikitext import PYTHON, held_out_text

BUNDLED = Path(__file__).parent / "checkpoint"
PROMPT = "    def __init__(self, "
WINDOWS = 64  # of held-out text, evenly spread


def variants(source: Checkpoint, ratio: float, max_group: int | None, ridge: float, tokens: Tensor,
             runner: calibrate.Runner) -> tuple[list[list[int]], dict[str, Network]]:
    """(the groups, {name: model}) of the dense model and of the ways to make it shallower."""
    dense, max_group = Network.of(source), max_group or source.config.num_hidden_layers
    n, text = flatten.merges_for_ratio(source.config, ratio, max_group), Calibration(tokens, runner, len(dense.blocks))
    return groups_of(dense, n, text, max_group), {
        "dense": dense,
        "blocks dropped (ShortGPT)": shortgpt(dense, n, text),
        "flattened only (wide)": wide(dense, n, text, max_group),
        "flattened, pruned, not compensated": flattengpt(dense, n, text, ridge, max_group, compensate=False),
        "flattened and pruned": flattengpt(dense, n, text, ridge, max_group),
    }


def tour(args: argparse.Namespace) -> None:
    """Print the table: parameters, blocks, held-out perplexity and speed of each model; then two samples."""
    if args.out or args.keep_wide or args.overwrite or args.explain or args.no_eval or args.refit \
            or args.group_by != "similarity":
        raise ValueError("--out, --keep-wide, --overwrite, --explain, --no-eval, --refit and --group-by need --ckpt (the "
                         "bundled model is demo/checkpoint); without it flatten.py only shows what the method does")
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
    samples, prompt = {}, torch.tensor([tokenizer.encode(PROMPT)], device=args.device)
    for label, network in models.items():
        net = whole(network, runner)
        score = math.exp(losses(net, windows, args.device).double().mean())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            ids = generate(net, prompt, 64)
            times.append(time.perf_counter() - start)
        samples[label], speed = tokenizer.decode(ids[0].tolist()), 64 / min(times)
        print(f"| {label} | {network.parameters():,} | {len(network.blocks)} | {score:.3f} | {speed:.0f} |", flush=True)
    for label in ("dense", "flattened and pruned"):
        print(f"\n{label} continues {PROMPT.strip()!r}:\n{samples[label]}")
    print("\nTo write the result as a checkpoint:\n"
          "python flatten.py --ckpt demo/checkpoint --data python --samples 64 --length 256")
