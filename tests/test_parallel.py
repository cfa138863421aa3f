"""Two and three processes make what one makes.

The functions are compared in float64, in processes that run this very file; the commands as a user
starts them.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import console
import evaluate
import flatten
import parallel
from beyond.grouping import damages
from beyond.material import draw
from beyond.refit import Fit, refit_groups
from beyond.training import held_out_loss, sum_gradients
from calibrate import measure, write
from checkpoint.reader import Checkpoint
from demo import tour
from evaluate import divergence, losses, probe, readout
from flatten import merge_groups, paper, with_errors
from model import Runner, embed, load

GROUPS = [[0], [1, 2], [3, 4]]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node")


def trial_fit(run: Runner):
    """Return what makes the halves of a trial merge from the dense stream."""
    def halves(dense):
        fit = Fit(dense, run)
        return fit.attention, fit.mlp
    return halves


def made(ckpt: Path, windows: int) -> tuple[dict, list]:
    """Return what several processes must agree on: tensors by name, and the reports of merges."""
    source = Checkpoint(ckpt)
    tokens = torch.randint(3, 300, (windows, 16), generator=torch.Generator().manual_seed(0))
    run, mine = tiny.runner(source.config, 16), parallel.share(tokens)
    tensors = dict(vars(measure(source, tokens, run)))
    xs, ys = (embed(source.outer(), mine, torch.float64) for _ in range(2))
    tensors["probe"], reports = parallel.whole(probe(xs)), []
    merges = {"paper": merge_groups(source, GROUPS, xs, run, *with_errors(*paper(run, 10.0), run)),
              "fit": refit_groups(source, GROUPS, ys, run)}
    for method, blocks in merges.items():
        for k, (block, report) in enumerate(blocks):
            tensors |= {f"{method} {k} {name}": tensor for name, tensor in block.items()}
            reports.append(report)
    tensors["streams"] = parallel.whole(ys)
    logits_of, net = readout(source.outer(), run), load(ckpt, dtype=torch.float64)
    tried = damages(source, tokens, run, trial_fit(run), 2, {})
    batch = draw([tokens.flatten()], 4, 16, seed=1)
    tensors["losses"] = parallel.whole(losses(net, mine, "cpu"))
    tensors["numbers"] = torch.tensor([divergence(logits_of, xs, logits_of, ys, run.device),
                                       held_out_loss(net, batch, "cpu"), *tried.values()])
    tensors["written"] = write(net, torch.ones(40, 1, dtype=torch.long), 12, seed=0)
    net.requires_grad_(True)
    if len(mine):  # a process without windows has no gradients
        net(mine).square().sum().backward()
    trained = list(net.parameters())
    sum_gradients(trained)
    return tensors | {f"gradient {k}": p.grad for k, p in enumerate(trained)}, reports


def main() -> None:
    """Make it together with other processes. The last of these writes what came out."""
    ckpt, windows, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    tensors, reports = made(ckpt, windows)
    if parallel.rank() == parallel.ranks() - 1:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, out)
        out.with_suffix(".json").write_text(json.dumps(reports))


def start(processes: int, *words) -> subprocess.Popen:
    """Start a command by torchrun, in the folder of the five files, with one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}
    return subprocess.Popen([*TORCHRUN, str(processes), *map(str, words)], cwd=tiny.ROOT, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("processes, windows", [(2, 35), (3, 2)])
def test_processes_make_together_what_one_makes_alone(tmp_path, processes, windows):
    """35 windows do not divide by 2, and of 2 windows the third process has none."""
    ckpt, out = tiny.checkpoint(tmp_path / "tiny"), tmp_path / "out.safetensors"
    code, _, errors = run(processes, __file__, ckpt, windows, out)
    assert (code, errors) == (0, [])
    tensors, reports = made(ckpt, windows)
    others = load_file(out)
    assert others.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_close(others[name], tensor, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)
    read = json.loads(out.with_suffix(".json").read_text())
    for report, other in zip(reports, read, strict=True):
        assert report.keys() == other.keys()
        for name, value in report.items():
            whole = name in ("kv_heads", "channels")  # lists of indices for each member
            assert other[name] == (value if whole else pytest.approx(value))


@pytest.mark.parametrize("N", [2, 4, 5])
def test_what_each_process_puts_in_place_adds_up_to_the_whole(monkeypatch, N):
    """One process after the other is played; `total` gives back what one process puts in."""
    values = torch.arange(1.0, 2 * N + 1).view(N, 2)
    monkeypatch.setattr(parallel, "total", lambda value: value if torch.is_tensor(value) else N)
    for processes in (1, 2, 3):
        placed = []
        monkeypatch.setattr(parallel, "ranks", lambda processes=processes: processes)
        for rank in range(processes):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            placed.append(parallel.whole(parallel.share(values)))
        tiny.expect(f"the parts of {processes} processes, added up", values, sum(placed))


def run(processes: int, *words) -> tuple[int, str, str]:
    """Run a command by torchrun. Returns its exit code, stdout, and the lines of errors."""
    with start(processes, *words) as command:
        try:
            out, err = command.communicate(timeout=100)
        finally:
            command.terminate()  # torchrun ends its processes
    return command.returncode, out, [line for line in err.splitlines() if line.startswith("error")]


def test_flatten_and_evaluate_by_several_processes(ckpt, text_file, tmp_path, cli):
    common = "--ckpt", ckpt, "--data", text_file
    some = (*common, "--ratio", 0.3, "--samples", 13, "--length", 16, "--no-eval", "--out")
    assert cli(flatten.main, *some, tmp_path / "one")[0] == 0
    code, out, errors = run(2, "flatten.py", *some, tmp_path / "two")
    assert (code, errors, out.count("wrote ")) == (0, [], 1), out
    one, two = (json.loads((tmp_path / name / "flatten.json").read_text())
                for name in ("one", "two"))
    for group, other in zip(one["groups"], two["groups"], strict=True):
        for name in ("blocks", "kv_heads", "channels"):
            assert group.get(name) == other.get(name)
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in weights.items():
        assert float((others[name] - tensor).norm() / tensor.norm()) < 1e-6, name
    judge = (*common, "--window", 64, "--max-windows", 7)
    _, alone, _ = cli(evaluate.main, *judge)
    code, together, errors = run(2, "evaluate.py", *judge)
    assert (code, errors) == (0, [])
    row = next(line for line in alone.splitlines() if line.startswith("| tiny"))
    assert row.rpartition("|")[0].rpartition("|")[0] in together  # all but the speed


DIFFERENT = """
import console, flatten, parallel, prune

def main():
    if parallel.rank():
        {}
    flatten.main()
console.run(main, torchrun="together")
"""


@pytest.mark.parametrize("what, change", [
    ("heads or channels", "prune.best = lambda scores, k: scores.argsort()[:k].sort().values"),
    ("groups", "flatten.select_groups = lambda *_: [[0, 1], [2], [3], [4]]")])
def test_processes_that_choose_differently_say_so_and_write_nothing(ckpt, text_file, tmp_path, what,
                                                                   change):
    script, out = tmp_path / "different.py", tmp_path / "results" / "out"
    script.write_text(DIFFERENT.format(change))
    code, _, errors = run(2, script, "--ckpt", ckpt, "--data", text_file, "--ratio", 0.1,
                          "--samples", 4, "--length", 16, "--no-eval", "--out", out)
    assert code != 0 and errors and all(f"chose different {what}" in line for line in errors)
    assert not out.parent.exists()


def test_a_mistake_of_all_processes_is_told_once_and_leaves_nothing(ckpt, text_file, tmp_path):
    out = tmp_path / "results" / "out"
    code, _, errors = run(2, "flatten.py", "--ckpt", ckpt, "--data", text_file, "--samples", 10**6,
                          "--out", out)
    first = [line for line in errors if "process 1: " not in line]  # it waits, but not forever
    assert code != 0 and len(first) == 1 and "fewer --samples" in first[0]
    assert not out.parent.exists()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_process_that_is_killed_ends_the_others_and_leaves_nothing(tmp_path):
    out = tmp_path / "results" / "out"
    with start(2, "-m", "beyond.refit", "--ckpt", "demo/checkpoint", "--data", "python",
               "--samples", 300, "--length", 256, "--no-eval", "--out", out) as command:
        try:
            while command.poll() is None and not list(out.parent.glob(".out.partial-*")):
                time.sleep(0.1)
            second = next(pid for pid in Path("/proc").glob("[0-9]*") if is_rank(pid, 1, command))
            os.kill(int(second.name), signal.SIGKILL)
            _, err = command.communicate(timeout=100)
        finally:
            command.kill()
    assert command.returncode != 0 and err.count("\nerror: ") <= 1
    assert not out.parent.exists()


def is_rank(process: Path, rank: int, command: subprocess.Popen) -> bool:
    """Tell whether a process in /proc is the one of this rank that torchrun has started."""
    with contextlib.suppress(OSError, IndexError):
        parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
        environment = process.joinpath("environ").read_bytes().split(b"\0")
        return int(parent) == command.pid and f"RANK={rank}".encode() in environment
    return False


def test_a_command_for_one_process_says_so(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = cli(tour.main)
    assert code == 2 and "start it without torchrun" in error


def test_compare_shares_its_cells(ckpt, text_file, tmp_path):
    code, _, errors = run(2, "-m", "compare", "--ckpt", ckpt, "--data", text_file, "--ratios", 0.3,
                          "--methods", "shortgpt", "flattengpt", "--samples", 4, "--length", 16,
                          "--windows", 4, "--out", tmp_path / "compared")
    assert (code, errors) == (0, [])
    rows = (tmp_path / "compared" / "results.jsonl").read_text().splitlines()
    assert sorted(json.loads(row)["method"] for row in rows) == ["dense", "flattengpt", "shortgpt"]
    table = (tmp_path / "compared" / "table.md").read_text()
    assert all(name in table for name in ("dense", "flattengpt", "shortgpt"))


if __name__ == "__main__":
    console.run(main, torchrun="together")
