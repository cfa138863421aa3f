"""What a run moves to a device and back, and how often it waits, on a device that is played.

No GPU is needed. A tensor on the played device holds an ordinary one, and says that it is on the
device "meta". It refuses to meet tensors of the CPU, as on a GPU. Every copy between the two is
counted, and every number that the CPU reads.
"""
import contextlib

import pytest
import tiny
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from beyond.grouping import damages
from beyond.refit import QUICK, Fit, refit_groups
from calibrate import measure
from checkpoint.reader import Checkpoint
from compare.zeroshot import log_likelihoods
from console import forecast
from evaluate import losses_streamed
from flatten import merge_groups, paper
from model import Runner, embed

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default,
         aten.equal.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default}  # indices may be on the CPU
GROUPS = [[0], [1, 2], [3, 4]]


class There(torch.Tensor):
    """A tensor on the played device; `held` is the ordinary one."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "There":
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(),
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
        values = [x for x in everything if isinstance(x, torch.Tensor)]
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
        return tree_map(lambda x: There(x) if on and isinstance(x, torch.Tensor) else x, out)


def ordinary(x):
    """Return the tensor behind one of the device, and the CPU in place of the device."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.held if isinstance(x, There) else x


def work(ckpt, device: str, method: str, windows: int) -> list[torch.Tensor]:
    """Do one part of a run in float64, on windows of 16 tokens. Returns what comes out of it."""
    source = Checkpoint(ckpt)
    tokens = torch.randint(3, 300, (windows, 16), generator=torch.Generator().manual_seed(0))
    run = Runner(source.config, 16, device, torch.float64)
    if method == "measure":
        return list(vars(measure(source, tokens, run)).values())
    if method == "evaluate":
        return [losses_streamed(source, tokens, device, torch.float64)]
    if method == "choices":
        pairs = [(row[:12].tolist(), row[12:].tolist()) for row in tokens]
        return [log_likelihoods(source, pairs, device, torch.float64)]
    if method == "damage":
        def trial(dense):
            fit = Fit(dense, run, 10.0, QUICK)
            return fit.attention, fit.mlp
        needs = {"streams": tokens.numel() * 32 * 8}
        return [torch.tensor(list(damages(source, tokens, run, trial, 2, needs, 2).values()))]
    xs = run.home(embed(source.outer(), tokens, run.dtype), {"streams": tokens.numel() * 32 * 8})
    made = (merge_groups(source, GROUPS, xs, run, *paper(run, 10.0)) if method == "paper" else
            refit_groups(source, GROUPS, xs, run))
    return [tensor for block, _ in made for tensor in block.values()]


def played(*arguments) -> tuple[Played, list[torch.Tensor]]:
    """Do the work on the played device. Returns what it counted, and what came out."""
    with torch.inference_mode(), Played() as device:
        return device, work(*arguments)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Let a batch be two windows, so that a run has many."""
    monkeypatch.setattr(forecast, "batch_tokens", lambda *_: 32)


@pytest.mark.parametrize("method", ["measure", "paper", "fit", "evaluate", "choices"])
def test_streams_stay_on_the_device_and_no_batch_makes_it_wait(ckpt, method):
    few, made = played(ckpt, "meta", method, 8)
    assert_close(made, work(ckpt, "cpu", method, 8), equal_nan=True)
    more, _ = played(ckpt, "meta", method, 16)
    assert more.reads == few.reads and len(more.back) == len(few.back)
    stream = 8 * 16 * 32 * 8                        # of the windows that are more, in float64
    extra = sum(more.there) - sum(few.there) - stream
    assert 0 <= extra <= 8 * 16 * 8 * 2 and len(more.there) - len(few.there) <= 8  # token ids
    assert sum(more.back) - sum(few.back) < stream // 20  # a few numbers of each batch


def test_every_block_goes_to_the_device_once_in_its_own_dtype(ckpt):
    config, (device, _) = Checkpoint(ckpt).config, played(ckpt, "meta", "evaluate", 8)
    stored = 4 * (5 * config.block_parameters() + 300 * 32 + 32)  # blocks, head, norm, in float32
    others = 8 * 16 * (32 * 8 + 8) + 2 * 2 * 16 * 4 * 4           # streams, ids, two rotary tables
    assert sum(device.there) == stored + others


@pytest.mark.parametrize("method", ["measure", "paper", "fit", "evaluate", "choices", "damage"])
def test_streams_without_room_on_the_device_come_and_go_in_batches(ckpt, monkeypatch, method):
    near, _ = played(ckpt, "meta", method, 8)
    monkeypatch.setattr(forecast, "free_memory", lambda device: 8 * 16 * 32 * 8)  # margin is more
    far, made = played(ckpt, "meta", method, 8)
    assert_close(made, work(ckpt, "cpu", method, 8), equal_nan=True)
    assert far.reads <= near.reads
    # at least, of a whole stream; damage passes one window of five, in several trials
    passes = {"measure": 5, "evaluate": 5, "paper": 6, "fit": 10, "choices": 5, "damage": 3}[method]
    assert sum(far.back) - sum(near.back) >= passes * 8 * 16 * 32 * 8


class Recorded:
    """Stands for a tensor in host memory, or for a queue of a GPU; writes down what happens."""
    is_cuda, shape = False, (4, 16, 32)

    def __init__(self, events: list, name: str = "windows"):
        self.events, self.name = events, name

    def __len__(self):
        return 4

    def __getitem__(self, rows):
        return Recorded(self.events, f"{rows.start}-{rows.stop}")

    def to(self, device, non_blocking):
        self.events.append(f"fetch {self.name}")
        return self

    def wait_stream(self, copies):
        self.events.append("arrived")

    def record_stream(self, work):
        self.events.append(f"hold {self.name}")

    def synchronize(self):
        self.events.append("done")


def test_a_gpu_copies_the_next_batch_while_it_works_on_one(monkeypatch):
    events, run = [], tiny.runner(tiny.config(), 16)
    run.device, run.tokens = torch.device("cuda"), 32
    queue = Recorded(events)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: queue)
    monkeypatch.setattr(torch.cuda, "stream", lambda copies: contextlib.nullcontext())
    for rows, _ in run.batches(Recorded(events)):
        events.append(f"work {rows.start}-{rows.stop}")
    assert events == ["fetch 0-2", "arrived", "hold 0-2", "fetch 2-4", "work 0-2",
                      "arrived", "hold 2-4", "work 2-4", "done"]
