"""Count what a run copies to a device and back, and how many numbers the host reads from it.

For each number that it reads, the host waits. No GPU is needed: the device is played. A tensor on
it holds an ordinary one, and says that it is on the device "meta". It refuses to meet tensors of
the CPU, as on a GPU. The arithmetic is done, so the model must be small. But each block is read,
and each stream copied, as often for a large one.

    python -m compare.copies --ckpt demo/checkpoint             half a minute
"""
from collections.abc import Callable
from itertools import product
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import console
from beyond.refit import refit_groups
from calibrate import measure
from checkpoint.reader import Checkpoint
from console import forecast
from evaluate import losses_streamed
from flatten import merge_groups, merges_for_ratio, paper, select_groups
from model import Runner, embed

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default,
         aten.equal.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default}  # indices may be on the CPU
WORK = ("measure", "paper", "fit", "evaluate")


class There(Tensor):
    """A tensor on the played device; `held` is the ordinary one."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(),
                                             dtype=held.dtype, device="meta")
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise AssertionError(f"{operation} when the device is not played any more")


class Played(TorchDispatchMode):
    """The device. Keeps the bytes of each copy there and back, and counts the numbers read."""

    def __init__(self):
        super().__init__()
        self.there, self.back, self.reads = [], [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        everything = tree_flatten((args, kwargs))[0]
        values = [x for x in everything if isinstance(x, Tensor)]
        places = {isinstance(x, There) for x in values if isinstance(x, There) or x.dim()}
        assert all(isinstance(x, There) or x.is_cpu for x in values), f"{operation} of no numbers"
        devices = [x for x in everything if isinstance(x, torch.device)]
        on = devices[0].type == "meta" if devices else True in places
        if operation in READS:
            self.reads += on
        elif operation in INDEXED:
            on = isinstance(values[0], There)
        elif operation is aten.copy_.default or (devices and values):
            on = on if devices else isinstance(values[0], There)
            if isinstance(values[-1], There) != on:
                (self.there if on else self.back).append(values[-1].nbytes)
                args = tree_map(lambda x: ordinary(x).clone() if x is values[-1] else x, args)
        else:
            assert len(places) < 2, f"{operation} of tensors of two devices"
        kwargs = kwargs or {}
        out = operation(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))
        if outs := tuple(kwargs[each.name] for each in operation._schema.arguments if each.is_out):
            return outs[0] if len(outs) == 1 else outs
        if operation._schema.is_mutable:  # in place
            return args[0]
        return tree_map(lambda x: There(x) if on and isinstance(x, Tensor) else x, out)


def ordinary(x):
    """Return the tensor behind one of the device, and the CPU in place of the device."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.held if isinstance(x, There) else x


def work(source: Checkpoint, tokens: Tensor, groups: list[list[int]], device: str, method: str,
         dtype: torch.dtype) -> list[Tensor]:
    """Do one part of a run on windows of tokens (N, T). Returns the tensors that come out of it."""
    runner, config = Runner(source.config, tokens.shape[1], device, dtype), source.config
    if method == "measure":
        return list(vars(measure(source, tokens, runner)).values())
    if method == "evaluate":
        return [losses_streamed(source, tokens, device, dtype)]
    needs = forecast.flattening(config, *tokens.shape, dtype.itemsize, max(map(len, groups)))
    xs = runner.home(embed(source.outer(), tokens, dtype), needs)
    made = (merge_groups(source, groups, xs, runner, *paper(runner, 10.0)) if method == "paper"
            else refit_groups(source, groups, xs, runner))
    return [tensor for block, _ in made for tensor in block.values()]


def main() -> None:
    parser = console.parser("Count what a run copies to a device and back.", __doc__)
    parser.add_argument("--ckpt", required=True, help="a small model")
    parser.add_argument("--ratio", type=float, default=0.2, help="default %(default)s")
    parser.add_argument("--samples", type=int, default=32, help="windows (default %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens (default %(default)s)")
    args = parser.parse_args()
    if min(args.samples, args.length) < 2:
        raise ValueError("--samples and --length must be at least 2")
    source = Checkpoint(args.ckpt)
    shape, L = (args.samples, args.length), source.config.num_hidden_layers
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(source.config.vocab_size, shape, generator=chance)
    runner = Runner(source.config, args.length, "cpu", torch.float32)
    merges = merges_for_ratio(source.config, args.ratio, L)
    groups = select_groups(measure(source, tokens, runner).S, merges, L)
    stored = sum(t.nbytes for i in range(L) for t in source.block(i).values())
    stream = forecast.stream(source.config, *shape)
    print(f"{source.path}: {merges} merges, {args.samples} x {args.length} random tokens\n"
          f"its blocks take {stored:,} bytes, one stream in float32 {stream:,}\n"
          "| work | streams live | blocks read | bytes to the device | back | numbers read |\n"
          "|---|---|---|---|---|---|")
    for method, fits in product(WORK, (True, False)):
        blocks = []
        with mock.patch.object(forecast, "fits", return_value=fits), \
                mock.patch.object(source, "block", counting(source.block, blocks)), \
                torch.inference_mode(), Played() as device:
            work(source, tokens, groups, "meta", method, torch.float32)
        print(f"| {method} | {'there' if fits else 'on the host'} | {len(blocks)} | "
              f"{sum(device.there):,} | {sum(device.back):,} | {device.reads:,} |", flush=True)


def counting(read: Callable, calls: list[int]) -> Callable:
    """Return the function `read` that also keeps each i that it is called with."""
    def counted(i: int):
        calls.append(i)
        return read(i)
    return counted


if __name__ == "__main__":
    console.run(main)
