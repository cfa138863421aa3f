"""Show what each step of the method costs on the bundled checkpoint, next to dropping blocks.

    python -m demo                 a table and two samples; less than a minute
    python -m demo --ratio 0.4
"""
import argparse
import math
import time

import torch
from torch import Tensor

import console
from calibrate import read_tokens
from checkpoint.reader import Checkpoint
from compare.dropping import shortgpt
from compare.flattened import flattengpt, groups_of, wide
from compare.network import Calibration, Network, whole
from console.options import add_run_options, compute_dtype, defaults
from evaluate import losses, windows_of
from flatten import BUNDLED, merges_for_ratio
from model import Runner, generate
from text.tokenizer import load_tokenizer
from text.wikitext import PYTHON, held_out_text

PROMPT = "    def __init__(self, "
WINDOWS = 64  # of held-out text, evenly spread
NEW = 64  # tokens to generate


def variants(source: Checkpoint, ratio: float, max_group: int | None, ridge: float, tokens: Tensor,
             runner: Runner) -> tuple[list[list[int]], dict[str, Network]]:
    """Make the model shallower in every way that the tour compares.

    Returns the groups of the flattened models, and the models by name, the dense one first.
    """
    dense, max_group = Network.of(source), max_group or source.config.num_hidden_layers
    n = merges_for_ratio(source.config, ratio, max_group)
    text = Calibration(tokens, runner, len(dense.blocks))
    selected = flattengpt(dense, n, text, ridge, max_group, compensate=False)
    return groups_of(dense, n, text, max_group), {
        "dense": dense,
        "blocks dropped (ShortGPT)": shortgpt(dense, n, text),
        "flattened only (wide)": wide(dense, n, text, max_group),
        "flattened, pruned, not compensated": selected,
        "flattened and pruned": flattengpt(dense, n, text, ridge, max_group),
    }


def measure(network: Network, runner: Runner, windows: Tensor,
            prompt: Tensor) -> tuple[float, float, Tensor]:
    """Return a model's perplexity on windows of text, its speed, and what it writes.

    The speed is in generated tokens per second, the best of three runs. The text is the ids
    (tokens,) of the prompt (1, T) and its continuation.
    """
    net, device = whole(network, runner), str(runner.device)
    perplexity = math.exp(losses(net, windows, device).double().mean())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        ids = generate(net, prompt, NEW)
        times.append(time.perf_counter() - start)
    return perplexity, NEW / min(times), ids[0]


def parse_args() -> argparse.Namespace:
    parser = console.parser("Show what each step of the method costs.", __doc__)
    parser.add_argument("--ratio", type=float, default=0.2,
                        help="fraction of all parameters to remove (default 0.2)")
    parser.add_argument("--max-group", type=int,
                        help="most blocks to join into one (default: no limit)")
    parser.add_argument("--ridge", type=float, help="ridge, in mean eigenvalues (default 10)")
    add_run_options(parser)
    args = parser.parse_args()
    if args.max_group is not None and args.max_group < 2:
        raise ValueError(f"--max-group must be at least 2; got {args.max_group}")
    defaults(args, {"data": PYTHON, "samples": 64, "length": 256})
    return args


def main() -> None:
    args = parse_args()
    source, tokenizer = Checkpoint(BUNDLED), load_tokenizer(BUNDLED)
    judged, name = held_out_text(args.data)
    tokens, text = read_tokens(BUNDLED, args)
    dtype = compute_dtype(args.dtype, args.device, source.dtype, solves=True)
    runner = Runner(source.config, args.length, args.device, dtype)
    groups, models = variants(source, args.ratio, args.max_group, args.ridge, tokens, runner)
    windows = windows_of(torch.tensor(tokenizer.encode(judged)), args.length)
    windows = windows[::max(1, len(windows) // WINDOWS)][:WINDOWS]
    print(f"the bundled checkpoint, calibrated on {args.samples} x {args.length} tokens of {text}, "
          f"judged on {len(windows)} x {args.length} tokens of {name}")
    joined = ["+".join(map(str, group)) for group in groups if len(group) > 1]
    print(f"joined: {', '.join(joined)}\n")
    print("| model | parameters | blocks | held-out perplexity | generated tokens/s |\n"
          "|---|---|---|---|---|")
    samples, prompt = {}, torch.tensor([tokenizer.encode(PROMPT)], device=args.device)
    for label, network in models.items():
        perplexity, speed, ids = measure(network, runner, windows, prompt)
        samples[label] = tokenizer.decode(ids.tolist())
        print(f"| {label} | {network.parameters():,} | {len(network.blocks)} | "
              f"{perplexity:.3f} | {speed:.0f} |", flush=True)
    for label in ("dense", "flattened and pruned"):
        print(f"\n{label} continues {PROMPT.strip()!r}:\n{samples[label]}")
