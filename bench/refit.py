"""What --refit costs next to the paper's pruning: one pair of blocks and one other, random weights, side by side.

The fit runs the members beside the merged block, and compares half again as many channels as stay: 1.6 to 1.8 n^3 flops in
float64 and three matrices of n^2 for n = 1.5 F of them, however much text there is. So its share falls with more text. The
whole run at --ratio is put together from the parts: both measure every block once, and every other block passes once more
what it makes of the text, up to the last pair; behind the first pair --refit passes two streams. So it is given for pairs
that all stand at the end, and for the first at the start and the others at the end, where --refit costs most.

    python -m bench.refit --shape tinyllama --samples 128 --length 1024
    python -m bench.refit --shape llama-2-7b --samples 1 --length 512 --only refit       does it fit into this memory?
"""
import resource
import time

import torch
from torch import Tensor

import console
from bench.speed import SHAPES, shape_config
from beyond.refit import refit_block
from calibrate import DTYPES, Runner, batches, compute_dtype, cosine_sums, observe
from checkpoint.reader import Weights
from console import run
from flatten import flatten_blocks, merges_for_ratio
from prune import prune_block


class Shape:
    """What a Runner needs to know of a checkpoint."""

    def __init__(self, name: str):
        self.config = shape_config(name)


@torch.inference_mode()
def look(runner: Runner, weights: Weights, xs: Tensor) -> None:
    """What the measuring pass does for one block: run it and compare its input with another stream."""
    block, ys = runner.block(weights), torch.empty_like(xs)
    for rows in batches(xs):
        x = xs[rows].to(runner.device)
        y, _ = observe(block, x, runner.rope)
        ys[rows] = y.to(ys.device)
        cosine_sums([x, y])


def main() -> None:
    parser = console.parser("Time the fit of one pair of blocks, next to the paper's pruning.", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama", help="default %(default)s")
    parser.add_argument("--samples", type=int, default=16, help="windows of random streams (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a window (default %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.2, help="fraction of all parameters to remove (default 0.2)")
    parser.add_argument("--only", choices=("paper", "refit"), help="only this, of a pair")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    args = parser.parse_args()
    if args.samples < 1 or args.length < 2:
        raise ValueError("--samples must be at least 1 and --length at least 2")
    shape, dtype = Shape(args.shape), compute_dtype(args.dtype, args.device, torch.float32)
    pairs, config, g = merges_for_ratio(shape.config, args.ratio, 2), shape.config, torch.Generator().manual_seed(0)
    members = [{name: torch.ones(size) if "norm" in name else torch.randn(size, generator=g) * 0.02
                for name, size in config.block_shapes().items()} for _ in range(2)]
    runner = Runner(shape, args.length, args.device, dtype)
    streams = torch.randn(args.samples, args.length, config.hidden_size, generator=g).to(dtype)
    works = {"measure": lambda: look(runner, members[0], streams),
             "run": lambda: runner.run_block(members[0], streams.clone()),
             "paper": lambda: prune_block(flatten_blocks(members), streams.clone(), runner, 10.0),
             "refit": lambda: refit_block(members, streams.clone(), streams.clone(), runner)}
    labels = {"measure": "measure a block", "run": "run a block", "paper": "prune a pair", "refit": "fit a pair"}
    spent = {}
    for name, work in works.items():
        if args.only in (None, name):
            start = time.perf_counter()
            work()
            spent[name] = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{args.shape}, {args.samples} x {args.length} tokens, {labels[name]}: {spent[name]:.1f} s, "
                  f"largest memory of the process so far {peak:.1f} GiB", flush=True)
    if args.only is None:
        L = config.num_hidden_layers
        paper, together, apart = (L * spent["measure"] + (L - 2 * pairs) * passes * spent["run"] + pairs * spent[name]
                                  for name, passes in (("paper", 1), ("refit", 1), ("refit", 2)))
        print(f"a pair, refit / paper: {spent['refit'] / spent['paper']:.2f}")
        print(f"{L} blocks, {pairs} pairs: paper {paper:.0f} s, refit {together:.0f} to {apart:.0f} s, refit / paper: "
              f"{together / paper:.2f} to {apart / paper:.2f} (all pairs at the end, the first at the start)")


if __name__ == "__main__":
    run(main)
