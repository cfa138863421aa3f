"""What a run moves to a device and back, and how often it waits: see compare/copies.py."""
import contextlib

import pytest
import tiny
import torch
from torch.testing import assert_close

from beyond.grouping import damages
from beyond.refit import Fit
from checkpoint.reader import Checkpoint
from compare import copies
from compare.zeroshot import log_likelihoods
from console import forecast
from model import Runner

GROUPS = [[0], [1, 2], [3, 4]]


def work(ckpt, device: str, method: str, windows: int) -> list[torch.Tensor]:
    """Do one part of a run in float64, on windows of 16 tokens. Returns what comes out of it."""
    source = Checkpoint(ckpt)
    tokens = torch.randint(3, 300, (windows, 16), generator=torch.Generator().manual_seed(0))
    if method == "choices":
        pairs = [(row[:12].tolist(), row[12:].tolist()) for row in tokens]
        return [log_likelihoods(source, pairs, device, torch.float64)]
    if method == "damage":
        run, needs = Runner(source.config, 16, device, torch.float64), {"streams": windows * 4096}

        def trial(dense):
            fit = Fit(dense, run, 10.0)
            return fit.attention, fit.mlp
        return [torch.tensor(list(damages(source, tokens, run, trial, 2, needs, 2).values()))]
    return copies.work(source, tokens, GROUPS, device, method, torch.float64)


def played(*arguments) -> tuple[copies.Played, list[torch.Tensor]]:
    """Do the work on the played device. Returns what it counted, and what came out."""
    with torch.inference_mode(), copies.Played() as device:
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
    assert 0 <= extra <= 8 * 16 * 8 * 2 and len(more.there) - len(few.there) <= 4  # token ids
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
    # at least, of a whole stream. Damage: half makes and half judges, in 5 blocks; four pairs judge
    # in 4 + 3 + 2 + 1 blocks
    passes = {"measure": 5, "evaluate": 5, "paper": 6, "fit": 10, "choices": 5,
              "damage": 5 + 10 / 2}[method]
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


def test_the_script_counts_each_block_once_in_its_own_dtype(ckpt, cli):
    code, out, _ = cli(copies.main, "--ckpt", ckpt, "--samples", 2, "--length", 16)
    rows = [[word.strip() for word in line.split("|")[1:-1]] for line in out.splitlines()[4:]]
    assert code == 0 and [row[:2] for row in rows] == [
        [method, place] for method in copies.WORK for place in ("there", "on the host")]
    assert {row[2] for row in rows} == {"5"}
    stored = 4 * (5 * Checkpoint(ckpt).config.block_parameters() + 300 * 32 + 32)
    others = 2 * 16 * (32 * 4 + 8) + 2 * 2 * 16 * 4 * 4  # stream, ids, two rotary tables
    assert rows[-2][3] == f"{stored + others:,}"
    for there, host in zip(rows[::2], rows[1::2], strict=True):
        assert int(host[4].replace(",", "")) > int(there[4].replace(",", ""))
