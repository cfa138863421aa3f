"""Every method on one checkpoint: same loader, same calibration ids, same evaluator, same number of parameters removed.

A cell is one method at one ratio with one seed of the calibration text. Methods that search (SLEB, LaCo and so on) judge
each trial by the first --trials windows of it. Finished cells are kept in OUT/results.jsonl and
not repeated; a failed cell is a row that says why. OUT also gets the table (table.md) and, with matplotlib, two figures.
Methods hold the whole model in memory.

    python -m baselines.compare --ckpt PATH --ratios 0.1 0.2 --methods flattengpt shortgpt sleb --seeds 3
    python -m baselines.compare --ckpt PATH                      every method; minutes for a small model
    python -m baselines.compare --ckpt PATH --methods shortgpt --save out/models       writes the checkpoints, too
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
from pathlib import Path

import torch
from torch import Tensor

import console
from baselines.methods import METHODS
from baselines.network import Calibration, Network, whole
from calibrate import Runner, add_arguments, calibration_tokens, compute_dtype, defaults
from checkpoint.reader import Checkpoint
from checkpoint.writer import Writer, check_output
from console import progress, run
from evaluate import losses, windows_of
from flatten import check_flattenable, merges_for_ratio
from text.tokenizer import load_tokenizer
from text.wikitext import calibration_text, evaluation_text, held_out_text, read

DENSE = "dense"


def spread(windows: Tensor, most: int) -> Tensor:
    """At most so many of the windows (N, T), evenly spread; all of them for 0."""
    if not 0 < most < len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, most).round().long()]


def digest(ids: Tensor) -> bytes:
    """SHA-256 of token ids."""
    return hashlib.sha256(ids.numpy().tobytes()).digest()


def weights_digest(source: Checkpoint) -> bytes:
    """Tells checkpoints apart: SHA-256 of the first block's and the last block's bytes."""
    blocks = [source.block(i) for i in (0, source.config.num_hidden_layers - 1)]
    return hashlib.sha256(b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for block in blocks
                                   for tensor in block.values())).digest()


def cells(ratios: list[float], methods: list[str], seeds: int) -> list[tuple[str, float, int]]:
    """(method, ratio, seed) of all cells, the dense model first."""
    return list(dict.fromkeys([(DENSE, 0.0, 0), *((method, ratio, seed) for ratio in ratios for method in methods
                                                  for seed in range(seeds))]))


def run_cell(source: Checkpoint, method: str, ratio: float, ids: Tensor, judged: dict[str, Tensor], runner: Runner,
             samples: int, trials: int, seed: int) -> tuple[dict, Network]:
    """What came of one cell: sizes, perplexity on each text, seconds and passes of compression; and the network."""
    dense = Network.of(source)
    tokens = calibration_tokens(ids, samples, next(iter(judged.values())).shape[1], seed)
    text, start = Calibration(tokens, runner, len(dense.blocks), trials), time.monotonic()
    network = dense if method == DENSE else METHODS[method][0](
        dense, merges_for_ratio(source.config, ratio, source.config.num_hidden_layers), text)
    seconds, net = time.monotonic() - start, whole(network, runner)
    scores = {name: math.exp(losses(net, windows, str(runner.device)).double().mean()) for name, windows in judged.items()}
    if not all(map(math.isfinite, scores.values())):
        raise ValueError("the perplexity is not finite")
    return {"parameters": network.parameters(), "removed": 1 - network.parameters() / dense.parameters(),
            "blocks": len(network.blocks), "ordinary": network.ordinary, "perplexity": scores, "seconds": seconds,
            "passes": text.passes}, network


def save(network: Network, source: Checkpoint, out: Path, record: dict) -> None:
    """The network as an ordinary checkpoint folder, with `record` as its flatten.json."""
    config = network.config
    with Writer(out, source) as writer:
        for block in network.blocks:
            writer.add(block)
        writer.finish([[i] for i in range(len(network.blocks))], record, changes={
            "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim, "intermediate_size": config.intermediate_size})


def read_rows(path: Path, settings: dict) -> list[dict]:
    """The finished cells of an earlier run with the same settings; ValueError if the file holds anything else.

    A last line that a kill has cut off is dropped.
    """
    rows, text = {}, read(path).decode("utf-8") if path.exists() else ""
    lines = text.split("\n")
    cut_off = lines.pop()
    for number, line in enumerate([*lines, *([cut_off] if cut_off and not cut_off.startswith('{"method"') else [])], 1):
        try:
            row = json.loads(line)
            same, key = row["settings"] == settings, (row["method"], row["ratio"], row["seed"])
            fits = isinstance(row["commit"], str) and tuple(map(type, key)) == (str, float, int) and (
                isinstance(row["error"], str) if "error" in row else isinstance(row["ordinary"], bool) and all(
                    math.isfinite(row[name]) for name in ("parameters", "removed", "blocks", "seconds", "passes"))
                and all(row["perplexity"][name] > 0 for name in row["settings"]["windows"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise ValueError(f"{path} line {number} is not a result of this program; choose another --out")
        if not same:
            raise ValueError(f"{path} holds results with other settings ({json.dumps(row['settings'])[:300]}); choose "
                             "another --out")
        rows[key] = row
    if cut_off:
        path.write_text("".join(line + "\n" for line in lines))
    return list(rows.values())


def summary(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds if there are several."""
    mean = statistics.mean(values)
    digits = ".2f" if mean < 1000 else ",.0f"
    return f"{mean:{digits}}" + (f" ± {statistics.stdev(values):{digits}}" if len(values) > 1 else "")


def excess(row: dict, dense: dict, name: str) -> float:
    """ln of a row's perplexity on a text over the dense model's: what compression has cost, in nats a token."""
    return math.log(row["perplexity"][name] / dense["perplexity"][name])


def table(rows: list[dict], texts: list[str]) -> str:
    """The rows as a Markdown table, one line for each method and ratio, seeds summarised; best first.

    Behind each perplexity stands the excess over the dense model, in nats a token.
    """
    dense = next((row for row in rows if row["method"] == DENSE and "error" not in row), None)
    lines = ["| ratio asked | method | source | removed | blocks | " + " | ".join(f"perplexity, {name}" for name in texts)
             + " | passes | seconds |", "|---" * (7 + len(texts)) + "|"]
    found = {}
    for row in rows:
        found.setdefault((row["ratio"], row["method"]), []).append(row)

    def order(item) -> tuple:
        (ratio, _), same = item
        good = [row["perplexity"][texts[0]] for row in same if "error" not in row]
        return ratio, statistics.mean(good) if good else math.inf
    for (ratio, method), same in sorted(found.items(), key=order):
        good = [row for row in same if "error" not in row]
        head = f"| {ratio or ''} | {method} | {METHODS[method][1] if method in METHODS else ''} | "
        if not good:
            lines.append(head + f"failed: {same[0]['error']} |" + " |" * (3 + len(texts)))
            continue
        reason = next((row["error"] for row in same if "error" in row), "")
        note = f" ({len(same) - len(good)} of {len(same)} seeds failed: {reason})" if reason else ""
        lines.append(head + " | ".join([
            f"{statistics.mean(row['removed'] for row in good):.4f}{note}", str(good[0]["blocks"]),
            *(summary([row["perplexity"][name] for row in good])
              + (f" ({statistics.mean(excess(row, dense, name) for row in good):+.4f})" if dense and method != DENSE else "")
              for name in texts),
            f"{statistics.mean(row['passes'] for row in good):.1f}",
            f"{statistics.mean(row['seconds'] for row in good):.1f}"]) + " |")
    return "\n".join(lines)


def relative(rows: list[dict], texts: list[str], reference: str = "flattengpt") -> str:
    """Excess of each method over that of the reference at the same ratio, means over seeds, as a Markdown table.

    Empty without a dense row or the reference; ratios at which the reference costs nothing are left out.
    """
    good = [row for row in rows if "error" not in row]
    dense = next((row for row in good if row["method"] == DENSE), None)
    lines = [f"excess relative to {reference}'s:", "| ratio asked | method | " + " | ".join(texts) + " |",
             "|---" * (2 + len(texts)) + "|"]

    def mean_excess(ratio: float, method: str, text: str) -> float:
        same = [row for row in good if (row["ratio"], row["method"]) == (ratio, method)]
        return statistics.mean(excess(row, dense, text) for row in same) if same and dense else 0.0
    for ratio, method in sorted({(row["ratio"], row["method"]) for row in good} - {(0.0, DENSE)}):
        theirs = [mean_excess(ratio, reference, text) for text in texts]
        if method != reference and theirs[0] > 0:
            shares = [f"{mean_excess(ratio, method, text) / their:.2f}" if their > 0 else "-"
                      for text, their in zip(texts, theirs, strict=True)]
            lines.append(f"| {ratio} | {method} | {' | '.join(shares)} |")
    return "\n".join([lines[0], "", *lines[1:]]) if len(lines) > 3 else ""


def figures(rows: list[dict], text: str, out: Path) -> str:
    """Draw perplexity against parameters removed and against the seconds spent; says what was drawn."""
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no figures: they need matplotlib (pip install matplotlib)"
    dense = next((row["perplexity"][text] for row in rows if row["method"] == DENSE and "error" not in row), None)
    good = [row for row in rows if "error" not in row and row["method"] != DENSE]
    if not good:
        return "nothing to draw"
    for quantity, label in (("removed", "parameters removed"), ("seconds", "seconds of compression")):
        fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
        for number, method in enumerate(dict.fromkeys(row["method"] for row in good)):
            points = sorted((row[quantity], row["perplexity"][text]) for row in good if row["method"] == method)
            ours = method == "flattengpt"
            ax.plot(*zip(*points, strict=True), marker="osv^Dx+*"[number % 8], label=method, markersize=5,
                    linestyle="-" if quantity == "removed" else "", linewidth=2.5 if ours else 0.8, zorder=3 if ours else 2)
        if dense:
            ax.axhline(dense, color="#888888", linewidth=0.8, linestyle=":")
        ax.set(xlabel=label, ylabel=f"perplexity, {text}", yscale="log", xscale="log" if quantity == "seconds" else "linear")
        ax.legend(fontsize=6, ncols=2, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        matplotlib.rcParams["svg.hashsalt"] = "flattengpt"
        fig.savefig(out / f"{quantity}.svg", metadata={"Date": None})
        plt.close(fig)
    return f"figures: {out}/removed.svg, {out}/seconds.svg"


def commit() -> str:
    """The commit of this repository, "unknown" outside a clone."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=Path(__file__).parent,
                               capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"


def parse_args() -> argparse.Namespace:
    parser = console.parser("Compare all methods on one checkpoint.", __doc__ + "\nmethods: " + ", ".join(METHODS))
    parser.add_argument("--ckpt", required=True, help="checkpoint folder")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2], help="shares of parameters (default 0.2)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=list(METHODS), help="default: all, listed below")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds of calibration text (default 1)")
    parser.add_argument("--windows", type=int, default=128, help="judge on at most so many windows, evenly spread; 0: all "
                                                                 "(default %(default)s)")
    parser.add_argument("--trials", type=int, default=16, help="windows by which methods that search judge a trial (default "
                                                               "%(default)s)")
    parser.add_argument("--also", nargs="+", default=[], metavar="FILE", help="other texts to judge on")
    parser.add_argument("--out", type=Path, help="where results go, and earlier ones are (default out/compare-NAME)")
    parser.add_argument("--save", type=Path, help="write the ordinary checkpoints to folders in here")
    add_arguments(parser)
    args = parser.parse_args()
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if args.seeds < 1 or args.windows < 0 or args.trials < 1:
        raise ValueError("--seeds and --trials must be at least 1, and --windows at least 0")
    if args.seed is not None:
        raise ValueError(f"--seed {args.seed} is not used here; seeds count from 0, and --seeds says how many there are")
    defaults(args, {"samples": 64, "length": 256})
    return args


def main() -> None:
    args = parse_args()
    source = Checkpoint(args.ckpt)
    check_flattenable(source)
    for ratio in args.ratios:
        merges_for_ratio(source.config, ratio, source.config.num_hidden_layers)
    tokenizer, (text, calibrated) = load_tokenizer(source.path), calibration_text(args.data)
    ids, judged = torch.tensor(tokenizer.encode(text)), {}
    for found, name in [held_out_text(args.data), *(evaluation_text(path) for path in args.also)]:
        if name in judged:
            raise ValueError(f"two texts are called {name}; rename one")
        judged[name] = spread(windows_of(torch.tensor(tokenizer.encode(found)), args.length), args.windows)
    runner = Runner(source, args.length, args.device, compute_dtype(args.dtype, args.device, source.dtype))
    settings = {"checkpoint": source.name, "calibration": calibrated, "samples": args.samples,
                "trials": args.trials, "length": args.length,
                "windows": {name: len(windows) for name, windows in judged.items()},
                "dtype": str(runner.dtype).removeprefix("torch."), "device": runner.device.type,
                "sha256": hashlib.sha256(b"".join(digest(part) for part in (ids, *judged.values())) + weights_digest(source)
                                         ).hexdigest()}
    out = args.out or Path("out") / f"compare-{settings['checkpoint']}"
    rows, todo = read_rows(out / "results.jsonl", settings), cells(args.ratios, args.methods, args.seeds)
    if out.exists() and not (out / "results.jsonl").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a result of this program (no results.jsonl); choose another --out")

    def folder(method: str, ratio: float, seed: int) -> Path:
        return args.save / f"{settings['checkpoint']}-{method}-{ratio}-{seed}"
    done = {(row["method"], row["ratio"], row["seed"]) for row in rows if "error" not in row}
    if args.save:
        unsaved = {key for row in rows if (key := (row["method"], row["ratio"], row["seed"])) in done
                   and row["ordinary"] and row["method"] != DENSE and not folder(*key).exists()}
        done -= unsaved
    left = [cell for cell in todo if cell not in done]
    for cell in left if args.save else ():
        check_output(folder(*cell), source.path, False)
    calibration_tokens(ids, args.samples, args.length, 0)  # a text too short is noticed now
    out.mkdir(parents=True, exist_ok=True)
    for method, ratio, seed in progress(left, "compare: cells", len(left)):
        row = {"method": method, "ratio": ratio, "seed": seed, "commit": commit()}
        try:
            found, network = run_cell(source, method, ratio, ids, judged, runner, args.samples, args.trials, seed)
            if args.save and network.ordinary and method != DENSE:
                save(network, source, folder(method, ratio, seed), row | found)
            row |= found
        except Exception as error:  # whatever it is, the other cells go on, and the row says why
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows = [old for old in rows if (old["method"], old["ratio"], old["seed"]) != (method, ratio, seed)] + [row]
        with open(out / "results.jsonl", "a") as file:
            file.write(json.dumps(row | {"settings": settings}) + "\n")
    lines = [f"{settings['checkpoint']}, calibrated on {args.samples} x {args.length} tokens of {calibrated}, judged on "
             + ", ".join(f"{len(windows)} windows of {args.length} of {name}" for name, windows in judged.items())
             + f"; {settings['dtype']}, seeds 0 to {max(row['seed'] for row in rows)}, {os.cpu_count()} CPU cores"
             + (f", {torch.cuda.get_device_name()}" if runner.device.type == "cuda" else "")
             + f", Python {platform.python_version()}, torch {torch.__version__}, commit "
             + ", ".join(sorted({row["commit"] for row in rows})),
             f"`python -m baselines.compare {shlex.join(sys.argv[1:])}`", table(rows, list(judged)),
             relative(rows, list(judged))]
    lines = list(filter(None, lines))
    (out / "table.md").write_text("\n\n".join(lines) + "\n")
    print("\n\n".join(lines) + f"\n\nwrote {out}/results.jsonl, {out}/table.md; "
          + figures(rows, next(iter(judged)), out))
    if all("error" in row for row in rows):
        raise ValueError(f"every cell failed, the first with: {rows[0]['error']}")


if __name__ == "__main__":
    run(main)
