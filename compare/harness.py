"""Run every method on one checkpoint, side by side.

All have the same loader, the same calibration ids, the same evaluator, and the same number of
parameters to remove. A cell is one method at one ratio with one seed of the calibration text.
Methods that search (SLEB, LaCo and so on) judge each trial by the first --trials windows of it.
Methods hold the whole model in memory. The dense model is read once, and measured once a seed.
Trial merges are made once a seed for all ratios. Their seconds and passes count for every method
that asks for them.

Finished cells are kept in OUT/results.jsonl and not repeated; a failed cell is a row that says why.
OUT also gets the table (table.md) and, with matplotlib, two figures.

    python -m compare --ckpt PATH                      every method; minutes for a small model
    python -m compare --ckpt PATH --ratios 0.1 0.2 --methods flattengpt shortgpt sleb --seeds 3
    python -m compare --ckpt PATH --methods shortgpt --save out/models       writes checkpoints, too

Under torchrun each process takes some of the cells, and the one that ends last writes the table.
"""
import argparse
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import console
import parallel
from calibrate import mixed_tokens, read_texts
from checkpoint.reader import Checkpoint
from checkpoint.writer import Writer, check_output
from compare.judge import Judge, legend, spread
from compare.methods import METHODS
from compare.network import Calibration, Measured, Network
from compare.rows import DENSE, RESULTS, Cell, append_row, cell_of, finished, read_rows
from compare.tables import figures, relative, table
from console import progress
from console.options import add_run_options, compute_dtype, defaults
from evaluate import windows_of
from flatten import check_flattenable, merges_for_ratio
from model import Runner
from text.tokenizer import load_tokenizer
from text.wikitext import SELF, evaluation_text, held_out_text


@dataclass(frozen=True)
class Bench:
    """What all cells have in common. The dense model is read when the first cell asks for it."""
    source: Checkpoint
    calibration: str             # what texts the methods see
    ids: list[Tensor | Callable]  # the tokens of each, (tokens,), or what writes windows
    judged: dict[str, Tensor]    # name of a text -> windows (N, T) of it
    samples: int                 # windows of calibration text
    trials: int                  # how many of them judge a trial
    runner: Runner
    measured: dict[int, Measured] = field(default_factory=dict)  # seed -> what its cells share

    @cached_property
    def dense(self) -> Network:
        """The dense model. No method changes it."""
        return Network.of(self.source)

    @cached_property
    def judge(self) -> Judge:
        """What judges the results of all cells."""
        return Judge(self.dense, self.judged, self.runner)

    def text(self, seed: int) -> Calibration:
        """Return the calibration text of a seed, with no pass counted yet."""
        tokens = mixed_tokens(self.ids, self.samples, self.length, seed)
        measured = self.measured.setdefault(seed, Measured())
        return Calibration(tokens, self.runner, len(self.dense.blocks), self.trials, measured)

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return next(iter(self.judged.values())).shape[1]

    def settings(self) -> dict:
        """Return what must be equal for results to be comparable."""
        sha256 = hashlib.sha256()
        read = [ids for ids in self.ids if not callable(ids)]  # else the model says it all
        for ids in (*read, *self.judged.values()):
            sha256.update(hashlib.sha256(ids.numpy().tobytes()).digest())
        sha256.update(weights_digest(self.source))
        return {"checkpoint": self.source.name, "calibration": self.calibration,
                "samples": self.samples, "trials": self.trials, "length": self.length,
                "windows": {name: len(windows) for name, windows in self.judged.items()},
                "dtype": str(self.runner.dtype).removeprefix("torch."),
                "device": self.runner.device.type, "sha256": sha256.hexdigest()}


def weights_digest(source: Checkpoint) -> bytes:
    """Return SHA-256 of the first and the last block's bytes.

    Recorded results name it, so it stays as it is, though Checkpoint.digest would do.
    """
    sha256 = hashlib.sha256()
    for i in (0, source.config.num_hidden_layers - 1):
        for tensor in source.block(i).values():
            sha256.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha256.digest()


def cells(ratios: list[float], methods: list[str], seeds: int) -> list[Cell]:
    """Return all cells, each once, the dense model first."""
    asked = [Cell(method, ratio, seed)
             for ratio in ratios for method in methods for seed in range(seeds)]
    return list(dict.fromkeys([Cell(DENSE, 0.0, 0), *asked]))


def run_cell(bench: Bench, cell: Cell) -> tuple[dict, Network]:
    """Compress the model as a cell says, and judge the result. Returns the results, and the model.

    The results are sizes, what the judge says, and the seconds and passes of compression.
    """
    dense, judge, text = bench.dense, bench.judge, bench.text(cell.seed)
    start, network = time.monotonic(), dense
    if cell.method != DENSE:
        compress, _ = METHODS[cell.method]
        n = merges_for_ratio(dense.config, cell.ratio, len(dense.blocks))
        network = compress(dense, n, text)
    seconds = time.monotonic() - start + text.saved
    return {"parameters": network.parameters(),
            "removed": 1 - network.parameters() / dense.parameters(),
            "blocks": len(network.blocks), "ordinary": network.ordinary, **judge.scores(network),
            "seconds": seconds, "passes": text.passes}, network


def try_cell(bench: Bench, cell: Cell, save_in: Path | None) -> dict:
    """Run a cell, and save its checkpoint if wanted. Returns its row, which says why it failed."""
    row = {**cell._asdict(), "commit": commit()}
    try:
        result, network = run_cell(bench, cell)
        if save_in and network.ordinary and cell.method != DENSE:
            groups = groups_left(network, bench.dense)
            record = row | result | ({"groups": groups} if groups else {})
            save(network, bench.source, folder_of(cell, bench.source, save_in), record)
        return row | result
    except Exception as error:  # whatever it is, the other cells go on, and the row says why
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def groups_left(network: Network, dense: Network) -> list[dict] | None:
    """Return the dense model's blocks that each block stands for: itself, and those left out next.

    The first block also stands for those left out before it. None if any block is new.
    """
    places = {id(block): i for i, block in enumerate(dense.blocks)}
    kept = [places.get(id(block)) for block in network.blocks]
    if None in kept:
        return None
    stops = [*kept[1:], len(dense.blocks)]
    return [{"blocks": list(range(start, stop))}
            for start, stop in zip([0, *kept[1:]], stops, strict=True)]


def save(network: Network, source: Checkpoint, out: Path, record: dict) -> None:
    """Write the network as an ordinary checkpoint folder, with `record` as its flatten.json."""
    config = network.config
    with Writer(out, source) as writer:
        for block in network.blocks:
            writer.add(block)
        writer.finish([[i] for i in range(len(network.blocks))], record, changes={
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim, "intermediate_size": config.intermediate_size})


def commit() -> str:
    """Return the commit of this repository, "unknown" outside a clone."""
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"],
                                   cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return described.stdout.strip() or "unknown"


def parse_args() -> argparse.Namespace:
    parser = console.parser("Compare all methods on one checkpoint.",
                            f"{__doc__}\nmethods: {', '.join(METHODS)}")
    parser.add_argument("--ckpt", required=True, help="checkpoint folder")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2],
                        help="shares of all parameters to remove (default 0.2)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=list(METHODS),
                        help="default: all, listed below")
    parser.add_argument("--seeds", type=int, default=1,
                        help="how many seeds of calibration text (default 1)")
    parser.add_argument("--windows", type=int, default=128,
                        help="most windows to judge on, evenly spread; 0: all "
                             "(default %(default)s)")
    parser.add_argument("--trials", type=int, default=16,
                        help="windows by which methods that search judge a trial "
                             "(default %(default)s)")
    parser.add_argument("--also", nargs="+", default=[], metavar="FILE",
                        help="other texts to judge on")
    parser.add_argument("--out", type=Path,
                        help="where results go, and earlier ones are (default out/compare-NAME)")
    parser.add_argument("--save", type=Path, help="write ordinary checkpoints to folders in here")
    add_run_options(parser)
    args = parser.parse_args()
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if args.seeds < 1 or args.windows < 0 or args.trials < 1:
        raise ValueError("--seeds and --trials must be at least 1, and --windows at least 0")
    if args.seed is not None:
        raise ValueError(f"--seed {args.seed} is not used here; seeds count from 0, and --seeds "
                         "says how many there are")
    defaults(args, {"samples": 64, "length": 256})
    return args


def prepare(source: Checkpoint, args: argparse.Namespace) -> Bench:
    """Read the texts and make ready what all cells have in common.

    ValueError if a ratio is out of reach, if a text is too short, or if two have one name.
    """
    check_flattenable(source)
    for ratio in args.ratios:
        merges_for_ratio(source.config, ratio, source.config.num_hidden_layers)
    tokenizer, judged = load_tokenizer(source.path), {}
    ids, names = read_texts(source.path, args)
    texts = [evaluation_text(path) for path in args.also]
    if not texts or set(args.data or []) != {SELF}:  # what a model writes itself cannot judge it
        texts.insert(0, held_out_text(args.data))
    for other, title in texts:
        if title in judged:
            raise ValueError(f"two texts are called {title}; rename one")
        windows = windows_of(torch.tensor(tokenizer.encode(other)), args.length)
        judged[title] = spread(windows, args.windows)
    dtype = compute_dtype(args.dtype, args.device, source.dtype, solves=True)
    runner = Runner(source.config, args.length, args.device, dtype)
    mixed_tokens(ids, args.samples, args.length, 0)  # fails now if a text is too short
    return Bench(source, names, ids, judged, args.samples, args.trials, runner)


def folder_of(cell: Cell, source: Checkpoint, save_in: Path) -> Path:
    """Return where --save puts the checkpoint of a cell."""
    return save_in / f"{source.name}-{cell.method}-{cell.ratio}-{cell.seed}"


def cells_left(rows: list[dict], args: argparse.Namespace, source: Checkpoint) -> list[Cell]:
    """Return the cells that are still to run, given the rows of an earlier run.

    With --save also those whose checkpoint is missing; ValueError if one may not be written.
    """
    done = set()
    for row in finished(rows):
        to_save = args.save and row["ordinary"] and row["method"] != DENSE
        if not to_save or folder_of(cell_of(row), source, args.save).exists():
            done.add(cell_of(row))
    left = [cell for cell in cells(args.ratios, args.methods, args.seeds) if cell not in done]
    if args.save:
        for cell in left:
            check_output(folder_of(cell, source, args.save), source.path, False)
    return left


def title_of(bench: Bench, rows: list[dict]) -> str:
    """Return one line that says what was measured, on what, and at which commits."""
    judged = ", ".join(f"{len(windows)} windows of {bench.length} of {name}"
                       for name, windows in bench.judged.items())
    device = bench.runner.device
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (f"{bench.source.name}, calibrated on {bench.samples} x {bench.length} tokens of "
            f"{bench.calibration}, judged on {judged}; "
            f"{str(bench.runner.dtype).removeprefix('torch.')}, "
            f"seeds 0 to {max(row['seed'] for row in rows)}, {os.cpu_count()} CPU cores{gpu}, "
            f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"commit {', '.join(sorted({row['commit'] for row in rows}))}")


def report(bench: Bench, rows: list[dict]) -> str:
    """Return what was measured, and the tables, in Markdown."""
    texts = list(bench.judged)
    parts = [title_of(bench, rows), f"`python -m compare {shlex.join(sys.argv[1:])}`",
             table(rows, texts), legend(bench.judged[texts[0]]), relative(rows, texts)]
    return "\n\n".join(filter(None, parts))


def main() -> None:
    args = parse_args()
    source = Checkpoint(args.ckpt)
    bench = prepare(source, args)
    settings = bench.settings()
    out = args.out or Path("out") / f"compare-{source.name}"
    rows = read_rows(out, settings)
    asked, (number, processes) = cells(args.ratios, args.methods, args.seeds), parallel.started()
    left = [cell for cell in cells_left(rows, args, source) if cell in asked[number::processes]]
    out.mkdir(parents=True, exist_ok=True)
    for cell in progress(left, "compare: cells", len(left)):
        append_row(out, try_cell(bench, cell, args.save) | {"settings": settings})
    rows = read_rows(out, settings, repair=False)
    if others := set(asked) - set(map(cell_of, rows)):
        print(f"{len(others)} cells are still with other processes; the last writes the table")
        return
    text = report(bench, rows)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    drawn = figures(rows, next(iter(bench.judged)), out)
    print(f"{text}\n\nwrote {out}/{RESULTS}, {out}/table.md; {drawn}")
    if all("error" in row for row in rows):
        raise ValueError(f"every cell failed, the first with: {rows[0]['error']}")
