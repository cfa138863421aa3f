"""Measure what the fit (beyond/refit.py) costs next to the paper's pruning, on random weights.

One pair of blocks is merged both ways, side by side, and one other block is measured and run. The
fit runs the members beside the merged block, and compares n = 1.5 F channels in full. That takes
1.6 to 1.8 n^3 flops in float64 and two matrices of n^2 numbers, however much text there is. So
the fit's share falls with more text.

The time of the whole run at --ratio, with groups by similarity, is put together from these parts.
Both methods measure every block once, on as much of the text as calibrate.measure takes. Blocks
that are not merged run once more, up to the last pair; after the first pair the fit sends two
streams through them, the paper's method one. So two numbers are given: all pairs at the end, and
the first pair at the start with the others at the end, where the fit costs most.

    python -m compare.refit_cost --shape tinyllama --samples 128 --length 1024

Does the fit of a large model go into this memory?

    python -m compare.refit_cost --shape llama-2-7b --samples 1 --length 512 --only refit
"""
import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import console
from beyond.refit import Fit
from calibrate import observe, windows_measured
from checkpoint.config import Config
from checkpoint.reader import Weights
from compare.speed import SHAPES, shape_config
from console.options import DEFAULT_DEVICE, DTYPES, compute_dtype
from flatten import merge_groups, merges_for_ratio, paper
from model import Runner

try:
    import resource
except ImportError:  # on Windows
    resource = None


class Pair:
    """Two blocks of random weights, as merge_groups reads them."""

    def __init__(self, config: Config):
        generator = torch.Generator().manual_seed(0)

        def random_block() -> Weights:
            return {name: torch.ones(shape) if "norm" in name else
                    torch.randn(shape, generator=generator) * 0.02
                    for name, shape in config.block_shapes().items()}
        self.members = [random_block(), random_block()]

    def block(self, i: int) -> Weights:
        """Return one of the two."""
        return self.members[i]


@torch.inference_mode()
def look(runner: Runner, weights: Weights, xs: Tensor) -> None:
    """Do what the measuring pass does for one block: run it, and look at what it adds."""
    block, ys = runner.block(weights), torch.empty_like(xs)
    for rows, (x,) in runner.batches(xs):
        y, _ = observe(block, x, runner.rope)
        ys[rows].copy_(y, non_blocking=True)


def parse_args() -> argparse.Namespace:
    parser = console.parser("Time the fit of one pair of blocks, next to the paper's pruning.",
                            __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama", help="default %(default)s")
    parser.add_argument("--samples", type=int, default=16,
                        help="windows of random streams (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048,
                        help="tokens in a window (default %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.2,
                        help="fraction of all parameters to remove (default 0.2)")
    parser.add_argument("--only", choices=("paper", "refit"),
                        help="merge the pair this way only, and time nothing else")
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    args = parser.parse_args()
    if args.samples < 1 or args.length < 2:
        raise ValueError("--samples must be at least 1 and --length at least 2")
    return args


def peak() -> str:
    """Word the most memory that this process has had: in bytes on macOS, in KiB elsewhere."""
    if resource is None:
        return "unknown"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{most / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GiB"


def main() -> None:
    args = parse_args()
    config = shape_config(args.shape)
    dtype = compute_dtype(args.dtype, args.device, torch.float32, solves=True)
    pairs, pair = merges_for_ratio(config, args.ratio, 2), Pair(config)
    runner = Runner(config, args.length, args.device, dtype)
    shape, generator = (args.samples, args.length, config.hidden_size), torch.Generator()
    streams = torch.randn(shape, generator=generator.manual_seed(1)).to(dtype)
    measured = windows_measured(args.samples, args.length)

    def merge(attention: Callable, mlp: Callable) -> None:
        next(merge_groups(pair, [[0, 1]], streams.clone(), runner, attention, mlp))

    def refit() -> None:
        fit = Fit(streams.clone(), runner)
        merge(fit.attention, fit.mlp)
    works = {"measure": lambda: look(runner, pair.block(0), streams[:measured]),
             "run": lambda: runner.run_block(pair.block(0), streams.clone()),
             "paper": lambda: merge(*paper(runner, 10.0)),
             "refit": refit}
    labels = {"measure": f"measure a block on {measured} windows", "run": "run a block",
              "paper": "prune a pair", "refit": "fit a pair"}
    spent = {}
    for name, work in works.items():
        if args.only in (None, name):
            start = time.perf_counter()
            work()
            spent[name] = time.perf_counter() - start
            print(f"{args.shape}, {args.samples} x {args.length} tokens, {labels[name]}: "
                  f"{spent[name]:.1f} s, largest memory of the process so far {peak()}",
                  flush=True)
    if args.only is None:
        L = config.num_hidden_layers
        measure, run = L * spent["measure"], (L - 2 * pairs) * spent["run"]
        plain = measure + run + pairs * spent["paper"]
        at_the_end = measure + run + pairs * spent["refit"]
        first_at_the_start = measure + 2 * run + pairs * spent["refit"]
        print(f"a pair, refit / paper: {spent['refit'] / spent['paper']:.2f}")
        print(f"{L} blocks, {pairs} pairs: paper {plain:.0f} s, "
              f"refit {at_the_end:.0f} to {first_at_the_start:.0f} s, refit / paper: "
              f"{at_the_end / plain:.2f} to {first_at_the_start / plain:.2f} "
              "(all pairs at the end, the first at the start)")


if __name__ == "__main__":
    console.run(main)
