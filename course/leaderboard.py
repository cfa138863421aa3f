"""Check and score entries of the leaderboard: the least excess loss with a fifth of the model gone.

An entry is a folder with one Python file that defines

    def compress(network, n, text):      the dense Network (compare/network.py), how many blocks
        return smaller_network           make up a fifth, and the calibration text: a Calibration

It runs in a process of its own, which is given calibration text only. What it returns is saved as
an ordinary checkpoint. That folder is what counts: it must open, have the model's vocabulary, and
at most four fifths of its parameters. Then held-out text judges it. Training is against the rules,
and the time limit leaves little room for it. In the recovery task the same function may train, on
the text that it is given; it gets more text and more time. This is NO SANDBOX, as in
course/grade.py.

    python -m course.leaderboard ENTRY [ENTRY ...]        ENTRY is a folder, or a method's name
    python -m course.leaderboard shortgpt flattengpt      methods of python -m compare as entries
    python -m course.leaderboard --task recover ENTRY     the recovery task
"""
import argparse
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import console
from calibrate import mixed_tokens, read_texts
from checkpoint.config import read_json
from checkpoint.reader import Checkpoint
from compare.harness import save
from compare.judge import spread
from compare.methods import METHODS
from compare.network import Calibration, Network
from course import process
from evaluate import losses, windows_of
from flatten import BUNDLED, merges_for_ratio
from model import Runner, load
from text.tokenizer import load_tokenizer
from text.wikitext import PYTHON, held_out_text

ROOT = Path(__file__).parents[1]
TASKS = {"compress": (64, 120), "recover": (320, 900)}  # windows of text, seconds
SHARE = 0.2     # of all parameters must go
WINDOWS = 128   # of held-out text judge
STARTING = 60   # seconds to start Python and read the text, beyond the time limit


# ---- in the entry's process

def compress_of(entry: str) -> Callable:
    """Return the function of an entry: of its one Python file, or a method by its name."""
    if not Path(entry).is_dir():
        if entry in METHODS:
            return METHODS[entry][0]
        raise ValueError(f"{entry} is no folder, and no method of python -m compare")
    files = sorted(Path(entry).glob("*.py"))
    if len(files) != 1:
        raise ValueError(f"{entry} must hold one Python file; it holds {len(files)}")
    spec = importlib.util.spec_from_file_location("entry", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "compress", None)):
        raise ValueError(f"{files[0]} must define compress(network, n, text)")
    return module.compress


def compress(entry: str, out: Path, args: argparse.Namespace) -> None:
    """Let an entry compress the model, and save what it returns as a checkpoint folder."""
    source = Checkpoint(args.ckpt)
    ids, _ = read_texts(source.path, args)
    tokens = mixed_tokens(ids, args.samples, args.length, seed=0)
    runner = Runner(source.config, args.length, "cpu", torch.float32)
    dense = Network.of(source)
    n = merges_for_ratio(source.config, SHARE, len(dense.blocks))
    function, start = compress_of(entry), time.monotonic()
    network = function(dense, n, Calibration(tokens, runner, len(dense.blocks)))
    seconds = time.monotonic() - start
    if not isinstance(network, Network) or not network.ordinary:
        raise ValueError("compress must return a Network that is an ordinary checkpoint")
    save(network, source, out, {"seconds": seconds})


# ---- in ours

def run(entry: str, out: Path, args: argparse.Namespace) -> None:
    """Run an entry in a process of its own. ValueError, with its last words, if it fails."""
    command = [sys.executable, "-m", "course.leaderboard", entry, "--write", out,
               "--ckpt", args.ckpt, "--data", *args.data, "--samples", args.samples,
               "--length", args.length]
    with tempfile.TemporaryFile() as errors:
        if process.run(command, args.seconds + STARTING, {"PYTHONPATH": str(ROOT)}, stderr=errors):
            errors.seek(max(0, errors.seek(0, 2) - 1000))
            last = errors.read().decode(errors="replace").strip().split("\n")[-1]
            raise ValueError(last.removeprefix("error: ")[:200] or "it ended without a word")


def loss_of(path: Path, windows: Tensor) -> float:
    """Return the mean loss of a checkpoint on windows (N, T), in nats a token."""
    return float(losses(load(path, dtype=torch.float32), windows, "cpu").double().mean())


def check(out: Path, dense: Checkpoint, seconds: float) -> dict:
    """Return the size of an entry's checkpoint and its time. ValueError if it breaks a rule."""
    result = Checkpoint(out)
    parameters, most = result.size()[0], int((1 - SHARE) * dense.size()[0])
    spent = read_json(out / "flatten.json")["seconds"]
    if result.is_wide or result.config.vocab_size != dense.config.vocab_size:
        raise ValueError("not an ordinary checkpoint of the same vocabulary")
    if parameters > most:
        raise ValueError(f"{parameters:,} parameters; at most {most:,} are allowed")
    if spent > seconds:
        raise ValueError(f"it took {spent:.0f} s; at most {seconds:.0f} are allowed")
    return {"parameters": parameters, "blocks": result.config.num_hidden_layers, "seconds": spent}


def score(entry: str, dense: Checkpoint, dense_loss: float, windows: Tensor,
          args: argparse.Namespace) -> str:
    """Run, check and judge an entry. Returns its row of the table, which says why it failed."""
    name = Path(entry).name
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            out = Path(folder) / "result"
            run(entry, out, args)
            found = check(out, dense, args.seconds)
            loss = loss_of(out, windows)
    except (ValueError, OSError, KeyError) as error:
        return f"| {name} | | | | | failed: {error} |"
    return (f"| {name} | {found['parameters']:,} | {found['blocks']} | {math.exp(loss):.2f} | "
            f"{loss - dense_loss:.4f} | {found['seconds']:.1f} |")


def parse_args() -> argparse.Namespace:
    parser = console.parser("Check and score entries of the leaderboard.", __doc__)
    parser.add_argument("entries", nargs="+", metavar="ENTRY",
                        help="a folder with one Python file, or a method's name")
    parser.add_argument("--ckpt", default=BUNDLED, help="default: the bundled checkpoint")
    parser.add_argument("--task", choices=TASKS, default="compress", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="time limit for an entry's function "
                        "(default: 120, to recover 900)")
    parser.add_argument("--write", type=Path, help="only compress, into this folder")
    parser.add_argument("--data", nargs="+", default=[PYTHON],
                        help="text; its last tenth, or the library's held-out modules, judge "
                             "(default: Python's library)")
    parser.add_argument("--samples", type=int, help="windows of text that the function gets "
                        "(default: 64, to recover 320)")
    parser.add_argument("--length", type=int, default=256,
                        help="tokens in a window (default %(default)s)")
    parser.set_defaults(device="cpu", dtype="float32")
    args = parser.parse_args()
    samples, seconds = TASKS[args.task]
    args.samples = samples if args.samples is None else args.samples
    args.seconds = seconds if args.seconds is None else args.seconds
    if args.samples < 1 or args.length < 2 or not 0 < args.seconds < math.inf:
        raise ValueError("--samples must be at least 1, --length at least 2, --seconds positive")
    return args


def main() -> None:
    args = parse_args()
    if args.write:
        compress(args.entries[0], args.write, args)
        return
    dense = Checkpoint(args.ckpt)
    text, name = held_out_text(args.data)
    windows = torch.tensor(load_tokenizer(dense.path).encode(text))
    windows = spread(windows_of(windows, args.length), WINDOWS)
    dense_loss = loss_of(dense.path, windows)
    print(f"{dense.name}, {args.samples} x {args.length} tokens for the function, judged on "
          f"{len(windows)} windows of {args.length} of {name}\n\n"
          "| entry | parameters | blocks | perplexity | excess loss | seconds |\n"
          "|---|---|---|---|---|---|\n"
          f"| dense | {dense.size()[0]:,} | {dense.config.num_hidden_layers} | "
          f"{math.exp(dense_loss):.2f} | 0 | |", flush=True)
    for entry in args.entries:
        print(score(entry, dense, dense_loss, windows, args), flush=True)


if __name__ == "__main__":
    console.run(main)
