"""Measure how much faster a flattened model reads and writes than the dense one.

Both are measured side by side in one run: prefill (read a text) and decode (write new tokens).
Speed depends on shapes alone, not on which blocks were joined. So random weights of the right shape
will do, and for the flattened model the first L' of their L blocks. The bound is the ratio that
would be reached if time were proportional to the parameters used: (L blocks + head) / (L' blocks +
head), where the head counts once for each text that is read.

    python -m compare.speed --shape tinyllama --ratio 0.2       random weights of a known shape
    python -m compare.speed --ckpt DENSE FLATTENED              two checkpoints
"""
import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import console
from checkpoint.config import Config
from checkpoint.reader import Checkpoint
from console import progress
from console.forecast import free_memory
from console.options import DEFAULT_DEVICE, DTYPES, compute_dtype
from flatten import merges_for_ratio
from model import Block, Cache, Transformer, load

SHAPES = {  # hidden_size, intermediate_size, blocks, query heads, KV heads, vocabulary
    "tinyllama": (2048, 5632, 22, 32, 4, 32000),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000),
}


def shape_config(name: str) -> Config:
    """Return the config of a model of SHAPES."""
    C, F, L, H, KV, V = SHAPES[name]
    return Config.parse({"model_type": "llama", "hidden_size": C, "intermediate_size": F,
                         "num_hidden_layers": L, "num_attention_heads": H,
                         "num_key_value_heads": KV, "vocab_size": V, "rms_norm_eps": 1e-5})


def random_model(config: Config, device: str, dtype: torch.dtype) -> Transformer:
    """Make a model of random weights, on the device."""
    generator = torch.Generator(device).manual_seed(0)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        empty = torch.empty(shape, device=device, dtype=dtype)
        return empty.fill_(1) if "norm" in name else empty.normal_(0, 0.02, generator=generator)

    def tensors(shapes: dict) -> dict:
        return {name: tensor(name, shape) for name, shape in shapes.items()}
    L = config.num_hidden_layers
    blocks = [Block(tensors(config.block_shapes()), config) for _ in range(L)]
    net = Transformer(config, blocks, tensors(config.outer_shapes()))
    return net.eval().requires_grad_(False)


def shallower(net: Transformer, blocks: int) -> Transformer:
    """Return a model of the same embeddings, head and first blocks; nothing is copied."""
    outer = {name: tensor for name, tensor in net.state_dict().items() if ".layers." not in name}
    made = Transformer(net.config, list(net.model["layers"])[:blocks], outer)
    return made.eval().requires_grad_(False)


def elapsed(work: Callable, device: str) -> float:
    """Return the seconds that work() takes: between CUDA events on a GPU, by the clock on a CPU."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):  # events belong to the device in use
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def medians(works: list[Callable], repeats: int, device: str, what: str) -> list[float]:
    """Return the median seconds of each work: all run in turn, `repeats` times after a warm-up.

    work() makes ready, and returns the function that is timed.
    """
    times = [[] for _ in works]
    for turn in progress(range(repeats + 1), what, repeats + 1):
        for spent, work in zip(times, works, strict=True):
            seconds = elapsed(work(), device)
            if turn:
                spent.append(seconds)
    return [statistics.median(spent) for spent in times]


def parameters_used(net: Transformer, tokens: int) -> int:
    """Return the parameters used to read tokens: all blocks for each, the head for the last."""
    blocks = sum(p.numel() for layer in net.model["layers"] for p in layer.parameters())
    return blocks * tokens + net.config.vocab_size * net.config.hidden_size


@torch.inference_mode()
def read(net: Transformer, ids: Tensor) -> None:
    """Read ids (B, T) and predict what comes next."""
    net.head(net.hidden(ids)[:, -1])


@torch.inference_mode()
def write(net: Transformer, states: Tensor, cache: Cache, new: int) -> None:
    """Append `new` tokens, the likeliest each time, to what the cache holds.

    states (B, T, C) are the last ones read.
    """
    for _ in range(new):
        states = net.hidden(net.head(states[:, -1:]).argmax(-1), cache)


def ready_to_read(net: Transformer, ids: Tensor) -> Callable:
    """Return the function that reads ids (B, T): the timed part of prefill."""
    return partial(read, net, ids)


@torch.inference_mode()
def ready_to_write(net: Transformer, ids: Tensor, new: int) -> Callable:
    """Read ids (B, T) and return the function that continues them: the timed part of decoding."""
    cache = Cache(ids.shape[1] + new)
    return partial(write, net, net.hidden(ids, cache), cache, new)


def measure(nets: list[Transformer], args: argparse.Namespace) -> Iterator[dict]:
    """Yield a row for prefill and one for decoding at each batch size.

    A row holds the tokens per second of the dense and of the flattened model, and their ratio.
    """
    vocabulary = nets[0].config.vocab_size
    for batch in args.batch:
        g = torch.Generator().manual_seed(0)
        for what, length in (("prefill", args.prefill), ("decode", args.prompt)):
            ids = torch.randint(vocabulary, (batch, length), generator=g).to(args.device)
            if what == "prefill":
                works = [partial(ready_to_read, net, ids) for net in nets]
                used = [parameters_used(net, length) for net in nets]  # in the one forward pass
                tokens = length
            else:
                works = [partial(ready_to_write, net, ids, args.new) for net in nets]
                used = [parameters_used(net, 1) for net in nets]  # in each of `new` forward passes
                tokens = args.new
            seconds = medians(works, args.repeats, args.device, f"{what}, batch {batch}")
            dense, flattened = (batch * tokens / each for each in seconds)
            yield {"what": what, "batch": batch, "tokens": tokens, "prompt": length,
                   "dense": dense, "flattened": flattened, "ratio": flattened / dense,
                   "bound": used[0] / used[1]}


def random_pair(args: argparse.Namespace, dtype: torch.dtype) -> list[Transformer]:
    """Make a dense and a flattened model of --shape. ValueError if memory does not suffice."""
    config = shape_config(args.shape)
    need = config.parameters() * torch.finfo(dtype).bits // 8
    free = free_memory(args.device)
    if need > free:
        raise ValueError(f"{args.shape} needs {need / 1e9:.1f} GB in {args.dtype}, and "
                         f"{free / 1e9:.1f} GB are free")
    dense = random_model(config, args.device, dtype)
    merges = merges_for_ratio(config, args.ratio, config.num_hidden_layers)
    return [dense, shallower(dense, config.num_hidden_layers - merges)]


def parse_args() -> argparse.Namespace:
    parser = console.parser("Measure the speed of a flattened model next to the dense one.",
                            __doc__)
    parser.add_argument("--shape", choices=SHAPES, help="a model of random weights of this shape")
    parser.add_argument("--ckpt", nargs=2, metavar=("DENSE", "FLATTENED"),
                        help="two checkpoint folders instead")
    parser.add_argument("--ratio", type=float, default=0.2,
                        help="share of parameters to remove from --shape (default 0.2)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8],
                        help="sequences at a time (default 1 8)")
    parser.add_argument("--prefill", type=int, default=512,
                        help="tokens read at once (default 512)")
    parser.add_argument("--prompt", type=int, default=64,
                        help="tokens before decoding (default 64)")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded (default 32)")
    parser.add_argument("--repeats", type=int, default=5,
                        help="runs; their median counts (default 5)")
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16",
                        help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="append the rows to this file as JSON lines")
    args = parser.parse_args()
    if (args.shape is None) == (args.ckpt is None):
        raise ValueError("give either --shape or --ckpt DENSE FLATTENED")
    if min(*args.batch, args.prefill, args.prompt, args.new, args.repeats) < 1:
        raise ValueError("--batch, --prefill, --prompt, --new and --repeats must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    dtype = compute_dtype(args.dtype, args.device, torch.bfloat16)
    if args.out and args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; give the name of a file")
    if args.shape:
        nets, name = random_pair(args, dtype), f"{args.shape}, random weights"
    else:
        sources = [Checkpoint(path) for path in args.ckpt]
        nets = [load(path, args.device, dtype) for path in args.ckpt]
        name = " and ".join(source.name for source in sources)
    depths, machine = [len(net.model["layers"]) for net in nets], f"{os.cpu_count()} CPU cores"
    if torch.device(args.device).type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    print(f"{name}: {depths[0]} and {depths[1]} blocks, {args.dtype}, {machine}, "
          f"torch {torch.__version__}, Python {platform.python_version()}, "
          f"median of {args.repeats} runs after one of warm-up")
    print("| | batch | dense, tokens/s | flattened, tokens/s | ratio | bound |\n"
          "|---|---|---|---|---|---|")
    run = {"model": name, "blocks": depths, "dtype": args.dtype, "machine": machine,
           "torch": torch.__version__}
    for row in measure(nets, args):
        what = f"{row['tokens']} new after {row['prompt']}"
        if row["what"] == "prefill":
            what = f"prefill of {row['tokens']}"
        print(f"| {what} | {row['batch']} | {row['dense']:,.1f} | {row['flattened']:,.1f} | "
              f"{row['ratio']:.2f} | {row['bound']:.2f} |", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a") as file:
                file.write(json.dumps(row | run) + "\n")


if __name__ == "__main__":
    console.run(main)
