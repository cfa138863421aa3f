"""Run every method on one checkpoint, side by side.

All have the same loader, the same calibration ids, the same evaluator, and the same number of
parameters to remove. A cell is one method at one ratio with one seed of the calibration text.
Methods that search (SLEB, LaCo and so on) judge each trial by the first --trials windows of it.
Methods hold the whole model in memory.

Finished cells are kept in OUT/results.jsonl and not repeated; a failed cell is a row that says why.
OUT also gets the table (table.md) and, with matplotlib, two figures.

    python -m compare --ckpt PATH                      every method; minutes for a small model
    python -m compare --ckpt PATH --ratios 0.1 0.2 --methods flattengpt shortgpt sleb --seeds 3
    python -m compare --ckpt PATH --methods shortgpt --save out/models       writes checkpoints, too
"""
import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import console
from calibrate import calibration_tokens
from checkpoint.reader import Checkpoint
from checkpoint.writer import Writer, check_output
from compare.methods import METHODS
from compare.network import Calibration, Network, whole
from console import progress
from console.options import add_run_options, compute_dtype, defaults
from evaluate import losses, windows_of
from flatten import check_flattenable, merges_for_ratio
from model import Runner
from text.tokenizer import load_tokenizer
from text.wikitext import calibration_text, evaluation_text, held_out_text, read

DENSE = "dense"


class Cell(NamedTuple):
    """One method at one ratio with one seed of the calibration text."""
    method: str
    ratio: float
    seed: int


@dataclass(frozen=True)
class Bench:
    """What all cells have in common."""
    source: Checkpoint
    calibration: str             # what text the methods see
    ids: Tensor                  # its tokens, (tokens,)
    judged: dict[str, Tensor]    # name of a text -> windows (N, T) of it
    samples: int                 # windows of calibration text
    trials: int                  # how many of them judge a trial
    runner: Runner

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return next(iter(self.judged.values())).shape[1]

    def settings(self) -> dict:
        """Return what must be equal for results to be comparable."""
        sha256 = hashlib.sha256()
        for ids in (self.ids, *self.judged.values()):
            sha256.update(hashlib.sha256(ids.numpy().tobytes()).digest())
        sha256.update(weights_digest(self.source))
        return {"checkpoint": self.source.name, "calibration": self.calibration,
                "samples": self.samples, "trials": self.trials, "length": self.length,
                "windows": {name: len(windows) for name, windows in self.judged.items()},
                "dtype": str(self.runner.dtype).removeprefix("torch."),
                "device": self.runner.device.type, "sha256": sha256.hexdigest()}


def spread(windows: Tensor, most: int) -> Tensor:
    """Return at most this number of the windows (N, T), evenly spread; all of them for 0."""
    if not 0 < most < len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, most).round().long()]


def weights_digest(source: Checkpoint) -> bytes:
    """Return SHA-256 of the first and the last block's bytes: it tells checkpoints apart."""
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

    The results are sizes, the perplexity on each text, and the seconds and passes of compression.
    """
    config, runner = bench.source.config, bench.runner
    dense = Network.of(bench.source)
    tokens = calibration_tokens(bench.ids, bench.samples, bench.length, cell.seed)
    text = Calibration(tokens, runner, len(dense.blocks), bench.trials)
    start, network = time.monotonic(), dense
    if cell.method != DENSE:
        compress, _ = METHODS[cell.method]
        n = merges_for_ratio(config, cell.ratio, config.num_hidden_layers)
        network = compress(dense, n, text)
    seconds, net = time.monotonic() - start, whole(network, runner)
    scores = {}
    for name, windows in bench.judged.items():
        scores[name] = math.exp(losses(net, windows, str(runner.device)).double().mean())
    if not all(map(math.isfinite, scores.values())):
        raise ValueError("the perplexity is not finite")
    return {"parameters": network.parameters(),
            "removed": 1 - network.parameters() / dense.parameters(),
            "blocks": len(network.blocks), "ordinary": network.ordinary, "perplexity": scores,
            "seconds": seconds, "passes": text.passes}, network


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


def cell_of(row: dict) -> Cell:
    """Return the cell that a row is about."""
    return Cell(row["method"], row["ratio"], row["seed"])


def is_result(row: dict) -> bool:
    """Tell whether a row has the form in which this program writes one."""
    try:
        types = [type(value) for value in (*cell_of(row), row["commit"], row["settings"])]
        if types != [str, float, int, str, dict]:
            return False
        if "error" in row:
            return isinstance(row["error"], str)
        numbers = [row[name] for name in ("parameters", "removed", "blocks", "seconds", "passes")]
        return isinstance(row["ordinary"], bool) and all(map(math.isfinite, numbers)) and all(
            row["perplexity"][name] > 0 for name in row["settings"]["windows"])
    except (KeyError, TypeError, OverflowError):
        return False


def read_rows(path: Path, settings: dict) -> list[dict]:
    """Return the finished cells of an earlier run with the same settings.

    A last line that a kill has cut off is taken out of the file. ValueError if the file holds
    anything else, or results with other settings.
    """
    if not path.exists():
        return []
    *lines, cut_off = read(path).decode("utf-8").split("\n")  # the last is empty in a whole file
    if cut_off and not cut_off.startswith('{"method"'):
        lines.append(cut_off)  # not the start of a row of ours: refused below
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not is_result(row):
            raise ValueError(f"{path} line {number} is not a result of this program; "
                             "choose another --out")
        if row["settings"] != settings:
            raise ValueError(f"{path} holds results with other settings "
                             f"({json.dumps(row['settings'])[:300]}); choose another --out")
        rows[cell_of(row)] = row
    if cut_off:
        path.write_text("".join(line + "\n" for line in lines))
    return list(rows.values())


def summary(values: list[float]) -> str:
    """Return the mean as text, with the standard deviation over seeds if there are several."""
    mean = statistics.mean(values)
    digits = ".2f" if mean < 1000 else ",.0f"
    deviation = f" ± {statistics.stdev(values):{digits}}" if len(values) > 1 else ""
    return f"{mean:{digits}}{deviation}"


def excess(row: dict, dense: dict, name: str) -> float:
    """Return what compression has cost on a text, in nats a token.

    It is the logarithm of the row's perplexity over the dense model's.
    """
    return math.log(row["perplexity"][name] / dense["perplexity"][name])


def finished(rows: list[dict]) -> list[dict]:
    """Leave out the rows of cells that failed."""
    return [row for row in rows if "error" not in row]


def dense_row(rows: list[dict]) -> dict | None:
    """Return the dense model's row; None if it is not there or failed."""
    return next((row for row in finished(rows) if row["method"] == DENSE), None)


def table(rows: list[dict], texts: list[str]) -> str:
    """Return a Markdown table: one line for each method and ratio, seeds summarised, best first.

    After each perplexity comes the excess over the dense model, in nats a token.
    """
    dense, groups = dense_row(rows), {}
    for row in rows:
        groups.setdefault((row["ratio"], row["method"]), []).append(row)

    def order(ratio_and_method: tuple[float, str]) -> tuple[float, float]:
        good = finished(groups[ratio_and_method])
        mean = statistics.mean(row["perplexity"][texts[0]] for row in good) if good else math.inf
        return ratio_and_method[0], mean
    head = ["ratio asked", "method", "source", "removed", "blocks",
            *(f"perplexity, {name}" for name in texts), "passes", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for ratio, method in sorted(groups, key=order):
        same = groups[ratio, method]
        good, errors = finished(same), [row["error"] for row in same if "error" in row]
        source = METHODS[method][1] if method in METHODS else ""
        start = f"| {ratio or ''} | {method} | {source} | "
        if not good:
            lines.append(f"{start}failed: {errors[0]} |" + " |" * (3 + len(texts)))
            continue
        removed = f"{statistics.mean(row['removed'] for row in good):.4f}"
        if errors:
            removed += f" ({len(errors)} of {len(same)} seeds failed: {errors[0]})"
        cost = []
        for name in texts:
            cost.append(summary([row["perplexity"][name] for row in good]))
            if dense and method != DENSE:
                cost[-1] += f" ({statistics.mean(excess(row, dense, name) for row in good):+.4f})"
        passes, seconds = (f"{statistics.mean(row[what] for row in good):.1f}"
                           for what in ("passes", "seconds"))
        values = [removed, str(good[0]["blocks"]), *cost, passes, seconds]
        lines.append(f"{start}{' | '.join(values)} |")
    return "\n".join(lines)


def relative(rows: list[dict], texts: list[str], reference: str = "flattengpt") -> str:
    """Return a Markdown table: each method's excess over the reference's at the same ratio.

    Excesses are means over seeds. Without a dense row or the reference there is no table, but "".
    Ratios at which the reference costs nothing are left out.
    """
    good, dense = finished(rows), dense_row(rows)

    def mean_excess(ratio: float, method: str, text: str) -> float:
        same = [row for row in good if (row["ratio"], row["method"]) == (ratio, method)]
        return statistics.mean(excess(row, dense, text) for row in same) if same and dense else 0.0
    lines = []
    for ratio, method in sorted({(row["ratio"], row["method"]) for row in good} - {(0.0, DENSE)}):
        theirs = [mean_excess(ratio, reference, text) for text in texts]
        if method != reference and theirs[0] > 0:
            ratios = [f"{mean_excess(ratio, method, text) / their:.2f}" if their > 0 else "-"
                      for text, their in zip(texts, theirs, strict=True)]
            lines.append(f"| {ratio} | {method} | {' | '.join(ratios)} |")
    if not lines:
        return ""
    head = [f"excess relative to {reference}'s:", "",
            f"| ratio asked | method | {' | '.join(texts)} |", "|---" * (2 + len(texts)) + "|"]
    return "\n".join(head + lines)


def figures(rows: list[dict], text: str, out: Path) -> str:
    """Draw perplexity against parameters removed and against seconds. Says what was drawn."""
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no figures: they need matplotlib (pip install matplotlib)"
    dense, good = dense_row(rows), [row for row in finished(rows) if row["method"] != DENSE]
    if not good:
        return "nothing to draw"
    matplotlib.rcParams["svg.hashsalt"] = "flattengpt"  # the same drawing, the same bytes
    for quantity, label, scale, line in (("removed", "parameters removed", "linear", "-"),
                                         ("seconds", "seconds of compression", "log", "")):
        fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
        for number, method in enumerate(dict.fromkeys(row["method"] for row in good)):
            points = sorted((row[quantity], row["perplexity"][text])
                            for row in good if row["method"] == method)
            ours = method == "flattengpt"
            ax.plot(*zip(*points, strict=True), marker="osv^Dx+*"[number % 8], label=method,
                    markersize=5, linestyle=line, linewidth=2.5 if ours else 0.8,
                    zorder=3 if ours else 2)
        if dense:
            ax.axhline(dense["perplexity"][text], color="#888888", linewidth=0.8, linestyle=":")
        ax.set(xlabel=label, ylabel=f"perplexity, {text}", yscale="log", xscale=scale)
        ax.legend(fontsize=6, ncols=2, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        fig.savefig(out / f"{quantity}.svg", metadata={"Date": None})
        plt.close(fig)
    return f"figures: {out}/removed.svg, {out}/seconds.svg"


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
    tokenizer, (text, name) = load_tokenizer(source.path), calibration_text(args.data)
    ids, judged = torch.tensor(tokenizer.encode(text)), {}
    calibration_tokens(ids, args.samples, args.length, 0)  # fails now if the text is too short
    others = [evaluation_text(path) for path in args.also]
    for other, title in [held_out_text(args.data), *others]:
        if title in judged:
            raise ValueError(f"two texts are called {title}; rename one")
        windows = windows_of(torch.tensor(tokenizer.encode(other)), args.length)
        judged[title] = spread(windows, args.windows)
    dtype = compute_dtype(args.dtype, args.device, source.dtype)
    runner = Runner(source.config, args.length, args.device, dtype)
    return Bench(source, name, ids, judged, args.samples, args.trials, runner)


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
    gpu = f", {torch.cuda.get_device_name()}" if bench.runner.device.type == "cuda" else ""
    return (f"{bench.source.name}, calibrated on {bench.samples} x {bench.length} tokens of "
            f"{bench.calibration}, judged on {judged}; "
            f"{str(bench.runner.dtype).removeprefix('torch.')}, "
            f"seeds 0 to {max(row['seed'] for row in rows)}, {os.cpu_count()} CPU cores{gpu}, "
            f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"commit {', '.join(sorted({row['commit'] for row in rows}))}")


def main() -> None:
    args = parse_args()
    source = Checkpoint(args.ckpt)
    bench = prepare(source, args)
    settings, texts = bench.settings(), list(bench.judged)
    out = args.out or Path("out") / f"compare-{source.name}"
    results = out / "results.jsonl"
    rows = read_rows(results, settings)
    if out.exists() and not results.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a result of this program (no results.jsonl); "
                         "choose another --out")
    left = cells_left(rows, args, source)
    out.mkdir(parents=True, exist_ok=True)
    for cell in progress(left, "compare: cells", len(left)):
        row = {**cell._asdict(), "commit": commit()}
        try:
            result, network = run_cell(bench, cell)
            if args.save and network.ordinary and cell.method != DENSE:
                save(network, source, folder_of(cell, source, args.save), row | result)
            row |= result
        except Exception as error:  # whatever it is, the other cells go on, and the row says why
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows = [old for old in rows if cell_of(old) != cell] + [row]
        with open(results, "a") as file:
            file.write(json.dumps(row | {"settings": settings}) + "\n")
    parts = [title_of(bench, rows), f"`python -m compare {shlex.join(sys.argv[1:])}`",
             table(rows, texts), relative(rows, texts)]
    report = "\n\n".join(filter(None, parts))
    (out / "table.md").write_text(report + "\n")
    print(f"{report}\n\nwrote {out}/results.jsonl, {out}/table.md; {figures(rows, texts[0], out)}")
    if all("error" in row for row in rows):
        raise ValueError(f"every cell failed, the first with: {rows[0]['error']}")
