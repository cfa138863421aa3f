"""What fitting a merged block to the dense model costs, next to the paper's pruning: one pair of blocks, random weights.

The fit runs the members beside the merged block and eliminates channels in float64, which takes about 2 n^3 flops and three
matrices of n^2 for the n = 2 F channels of a pair, however much text there is. So its share falls with more text.

    python -m bench.refit --shape tinyllama --samples 16
    python -m bench.refit --shape llama-2-7b --samples 1 --length 512 --only refit       does it fit into this memory?
"""
import resource
import time

import torch

import console
from bench.speed import SHAPES, shape_config
from beyond.refit import refit_block
from calibrate import DTYPES, Runner, compute_dtype
from console import run
from flatten import flatten_blocks
from prune import prune_block


class Shape:
    """What a Runner needs to know of a checkpoint."""

    def __init__(self, name: str):
        self.config = shape_config(name)


def main() -> None:
    parser = console.parser("Time the fit of one pair of blocks, next to the paper's pruning.", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama", help="default %(default)s")
    parser.add_argument("--samples", type=int, default=16, help="windows of random streams (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a window (default %(default)s)")
    parser.add_argument("--only", choices=("paper", "refit"), help="one of the two only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    args = parser.parse_args()
    if args.samples < 1 or args.length < 2:
        raise ValueError("--samples must be at least 1 and --length at least 2")
    shape, dtype = Shape(args.shape), compute_dtype(args.dtype, args.device, torch.float32)
    config, g = shape.config, torch.Generator().manual_seed(0)
    members = [{name: torch.ones(size) if "norm" in name else torch.randn(size, generator=g) * 0.02
                for name, size in config.block_shapes().items()} for _ in range(2)]
    runner = Runner(shape, args.length, args.device, dtype)
    streams = torch.randn(args.samples, args.length, config.hidden_size, generator=g).to(dtype)
    works = {"paper": lambda: prune_block(flatten_blocks(members), streams.clone(), runner, 10.0),
             "refit": lambda: refit_block(members, streams.clone(), streams.clone(), runner)}
    spent = {}
    for name, work in works.items():
        if args.only in (None, name):
            start = time.perf_counter()
            work()
            spent[name] = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{args.shape}, a pair of blocks, {args.samples} x {args.length} tokens, {name}: {spent[name]:.1f} s, "
                  f"largest memory of the process so far {peak:.1f} GiB", flush=True)
    if len(spent) == 2:
        print(f"refit / paper: {spent['refit'] / spent['paper']:.2f}")


if __name__ == "__main__":
    run(main)
