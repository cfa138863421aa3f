"""Compare recoveries at equal tokens: every way to compress, then every way to train.

Compressed is by dropping blocks (ShortGPT), by the paper, and by the fit with groups by similarity.
Each of these is then trained in every way of beyond.recover on the same windows. Each step is a
command of this project, which the row records. Finished rows are kept in OUT/results.jsonl and not
repeated. OUT also gets table.md and, with matplotlib, loss.svg: held-out loss against tokens.
--dtype is what training computes in. Judging is in float32.

`--bases dense` is a control: what the dense model itself gains by as much training. It has rows for
recipes with labels only, for it is its own teacher.

    python -m compare.recovery --ckpt demo/checkpoint --data python --steps 80 --batch 4
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import torch

import console
from checkpoint.reader import Checkpoint
from compare.harness import commit, save
from compare.judge import spread
from compare.network import Network
from compare.tables import summary
from console import command, progress
from console.options import DEFAULT_DEVICE, compute_dtype
from evaluate import losses, windows_of
from model import load
from text.tokenizer import load_tokenizer
from text.wikitext import evaluation_text, held_out_text

BASES = ("dense", "dropped", "paper", "fit")
RECIPES = {  # options of beyond.recover
    "none": {},
    "labels, LoRA": {"loss": "labels"},
    "labels, last 3 and head": {"loss": "labels", "last": 3},
    "KL, LoRA": {"loss": "kl"},
    "KL + hidden, LoRA": {"loss": "hidden"},
    "CoMe's two stages, LoRA": {"loss": "come"},
    "KL + hidden, all weights": {"loss": "hidden", "full": True},
}
Key = tuple[str, str, int]  # base, recipe, seed
SETTINGS = ("ckpt", "data", "also", "ratio", "samples", "length", "steps", "batch", "windows",
            "rate", "lora_rate", "device", "dtype")  # equal in all rows of a table


def run(script: str, **options) -> str:
    """Run a command of this project, and return it as it would be typed.

    ValueError with the last line that it printed if it fails.
    """
    root = Path(__file__).parents[1]
    line = command(script, **{name.replace("_", "-"): value for name, value in options.items()})
    line = line.replace(f"{root}{os.sep}", "")  # rows are published: no place on this machine
    with subprocess.Popen([sys.executable, *shlex.split(line)[1:]], cwd=root, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            _, errors = process.communicate()
        except KeyboardInterrupt:
            process.terminate()  # and wait until it has tidied up
            raise
    if process.returncode:
        raise ValueError(f"{line} failed: {(errors.strip().splitlines() or ['?'])[-1]}")
    return line


def compress(base: str, seed: int, args: argparse.Namespace) -> Path:
    """Make the compressed model of a base, unless it is there. Returns its folder."""
    source = Checkpoint(args.ckpt)
    shared = {"ckpt": args.ckpt, "data": args.data, "samples": args.samples,
              "length": args.length, "device": args.device}
    made_of = hashlib.sha256(json.dumps([source.digest(), args.ratio, shared]).encode())
    folder = args.models / made_of.hexdigest()[:8]
    out = folder / f"{base}-{seed}"
    if out.exists():
        return out
    if base == "dropped":
        run("-m compare", **shared, methods="shortgpt", ratios=args.ratio, seeds=seed + 1,
            windows=1, save=folder / "shortgpt", out=folder / "shortgpt-results")
        (folder / "shortgpt" / f"{source.name}-shortgpt-{args.ratio}-{seed}").rename(out)
    elif base == "dense":
        save(Network.of(source), source, out,
             {"groups": [{"blocks": [i]} for i in range(source.config.num_hidden_layers)]})
    else:
        script = "flatten.py" if base == "paper" else "-m beyond.refit --group-by similarity"
        run(script, **shared, ratio=args.ratio, seed=seed, out=out, no_eval=True)
    return out


def cell(key: Key, args: argparse.Namespace, judged: dict[str, torch.Tensor]) -> dict:
    """Compress and train as a key says, and judge the result. Returns the row."""
    base, recipe, seed = key
    path, row = compress(base, seed, args), {}
    if RECIPES[recipe]:
        out = path.parent / "recovered"
        out.with_name("recovered.unfinished").unlink(missing_ok=True)  # of a run that was killed
        line = run("-m beyond.recover", ckpt=path, teacher=args.ckpt, data=args.data,
                   **RECIPES[recipe], rate=args.rates["LoRA" in recipe], steps=args.steps,
                   batch=args.batch, length=args.length, device=args.device, dtype=args.dtype,
                   seed=seed, out=out, overwrite=True, no_eval=True)
        record = json.loads((out / "flatten.json").read_text())["recovery"][-1]
        row = {name: record[name] for name in ("tokens", "seconds", "held_out", "dense")}
        row["command"], path = line, out
    return {"base": base, "recipe": recipe, "seed": seed, "commit": commit(), "tokens": 0,
            "seconds": 0.0, **row, "loss": judge(path, judged, args.device),
            "settings": settings(args)}


def teaches(base: str, recipe: str) -> bool:
    """Tell whether a row says anything: the dense model as its own teacher does not."""
    return base != "dense" or RECIPES[recipe].get("loss") == "labels"


def judge(path: str | Path, judged: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    """Return a checkpoint's mean loss on windows (N, T) of each text."""
    net = load(path, device, torch.float32)
    return {name: float(losses(net, windows, device).double().mean())
            for name, windows in judged.items()}


def settings(args: argparse.Namespace) -> dict:
    """Return what must be equal for rows to be comparable."""
    return {name: getattr(args, name) for name in SETTINGS}


def read_rows(path: Path, expected: dict) -> list[dict]:
    """Read the rows of an earlier run.

    A last line that a kill has cut off is taken out of the file. ValueError if the rows have other
    settings, or are none of ours.
    """
    if not path.is_file():
        return []
    whole, _, cut_off = path.read_text().rpartition("\n")
    try:
        lines = whole.splitlines()
        if not '{"base"'.startswith(cut_off[:7]):  # not how a row of ours begins
            lines.append(cut_off)
        rows = [json.loads(line) for line in lines]
        same = all(row["settings"] == expected for row in rows)
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} holds no rows of this program; choose another --out") from None
    if not same:
        raise ValueError(f"{path} holds rows with other settings; choose another --out")
    if cut_off:
        path.write_text(f"{whole}\n" if whole else "")
    return rows


def tokens_to(curve: list[list[float]], target: float) -> float | None:
    """Return after how many tokens a curve of (tokens, loss) first reaches a loss; None if never.

    Between two points it is a straight line.
    """
    if curve[0][1] <= target:
        return 0.0
    for (t0, high), (t1, low) in pairwise(curve):
        if low <= target:
            return t0 + (t1 - t0) * (high - target) / (high - low)
    return None


def table(rows: list[dict], dense: dict[str, float]) -> str:
    """Return the rows as a Markdown table, means over seeds with standard deviations."""
    texts = list(dense)
    fit = {row["seed"]: row["held_out"][0][1] for row in rows
           if row["base"] == "fit" and "held_out" in row}
    lines = ["| compressed by | trained by | tokens | seconds | "
             + " | ".join(f"perplexity, {text} | excess" for text in texts)
             + " | tokens to the fit's loss |", "|---" * (5 + 2 * len(texts)) + "|",
             f"| dense | | | | {' | '.join(f'{math.exp(dense[t]):.2f} | 0' for t in texts)} | |"]
    for base, recipe in product(BASES, RECIPES):
        same = [row for row in rows if (row["base"], row["recipe"]) == (base, recipe)]
        if not same:
            continue
        values = []
        for text in texts:
            values.append(summary([math.exp(row["loss"][text]) for row in same]))
            values.append(summary([row["loss"][text] - dense[text] for row in same], 4))
        reached = [tokens_to(row["held_out"], fit[row["seed"]]) for row in same
                   if base not in ("dense", "fit") and "held_out" in row and row["seed"] in fit]
        known = [tokens for tokens in reached if tokens is not None]
        when = ("" if not reached else f"{statistics.mean(known):,.0f}"
                if len(known) == len(reached) else "not reached")
        lines.append(f"| {base} | {recipe} | {same[0]['tokens']:,} | "
                     f"{statistics.mean(row['seconds'] for row in same):.0f} | "
                     f"{' | '.join(values)} | {when} |")
    return "\n".join(lines)


def figure(rows: list[dict], out: Path) -> str:
    """Draw held-out loss against tokens, a panel for each base. Returns what was drawn."""
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no figure: it needs matplotlib (pip install matplotlib)"
    trained = [row for row in rows if "held_out" in row]
    bases = [base for base in BASES if any(row["base"] == base for row in trained)]
    if not trained:
        return "nothing to draw"
    matplotlib.rcParams["svg.hashsalt"] = "flattengpt"  # the same drawing, the same bytes
    fig, (axes,) = plt.subplots(1, len(bases), figsize=(2 + 3 * len(bases), 3.6), sharey=True,
                                layout="constrained", squeeze=False)
    for ax, base in zip(axes, bases, strict=True):
        for number, recipe in enumerate(RECIPES):
            curves = [row["held_out"] for row in trained
                      if (row["base"], row["recipe"]) == (base, recipe)]
            if curves:
                points = [tuple(map(statistics.mean, zip(*same, strict=True)))
                          for same in zip(*curves, strict=True)]
                ax.plot(*zip(*points, strict=True), color=f"C{number}", label=recipe)
        ax.axhline(trained[0]["dense"], color="#444444", linewidth=1, linestyle=":", label="dense")
        ax.set(title=base, xlabel="tokens")
    axes[0].set(ylabel="held-out loss, nats a token")
    handles = dict(pair[::-1] for ax in axes
                   for pair in zip(*ax.get_legend_handles_labels(), strict=True))
    fig.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper",
               frameon=False)
    fig.savefig(out / "loss.svg", metadata={"Date": None})
    plt.close(fig)
    return f"figure: {out}/loss.svg"


def parse_args() -> argparse.Namespace:
    parser = console.parser("Compare ways to recover a compressed model, at equal tokens.", __doc__)
    parser.add_argument("--ckpt", required=True, help="the dense model")
    parser.add_argument("--data", nargs="+", help="calibration and training text")
    parser.add_argument("--also", nargs="+", default=[], metavar="FILE",
                        help="other texts to judge on")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of parameters to remove")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES[1:],
                        help="default: all but dense")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES),
                        metavar="RECIPE", help=f"default: all ({'; '.join(RECIPES)})")
    for name, value in {"seeds": 1, "samples": 64, "length": 256, "steps": 500, "batch": 16,
                        "windows": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--lora-rate", type=float, help="learning rate of LoRA")
    parser.add_argument("--rate", type=float, help="learning rate of everything else "
                                                   "(defaults: those of beyond.recover)")
    parser.add_argument("--models", type=Path, default=Path("out/recovery"),
                        help="where compressed models go (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="where results go, or already are")
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="to train in (default: as stored on a GPU, float32 on a CPU)")
    args = parser.parse_args()
    counts = args.seeds, args.windows, args.samples, args.steps, args.batch
    if min(counts) < 1 or args.length < 2 or not 0 < args.ratio < 1:
        raise ValueError("--ratio must lie between 0 and 1, --length be at least 2, and all other "
                         "counts at least 1")
    if not all(rate is None or 0 < rate <= 1 for rate in (args.rate, args.lora_rate)):
        raise ValueError("--rate and --lora-rate must be positive and at most 1; got "
                         f"{args.rate} and {args.lora_rate}")
    dtype = compute_dtype(args.dtype, args.device, Checkpoint(args.ckpt).dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    args.models, args.out = args.models.absolute(), args.out.absolute()
    args.rates = args.rate, args.lora_rate
    return args


def main() -> None:
    args = parse_args()
    tokenizer, judged = load_tokenizer(args.ckpt), {}
    for text, name in [held_out_text(args.data), *map(evaluation_text, args.also)]:
        if name in judged:
            raise ValueError(f"two texts are called {name}; rename one")
        windows = windows_of(torch.tensor(tokenizer.encode(text)), args.length)
        judged[name] = spread(windows, args.windows)
    path = args.out / "results.jsonl"
    rows = read_rows(path, settings(args))
    dense = judge(args.ckpt, judged, args.device)
    done = {(row["base"], row["recipe"], row["seed"]) for row in rows}
    left = [key for key in product(args.bases, args.recipes, range(args.seeds))
            if key not in done and teaches(*key[:2])]
    if not rows and not left:
        raise ValueError("nothing to do: --bases dense has rows for recipes with labels only")
    for folder in (args.out, args.models):
        folder.mkdir(parents=True, exist_ok=True)
    for key in progress(left, "recovery: rows", len(left)):
        rows.append(cell(key, args, judged))
        with open(path, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    kinds = ", ".join(f"{len(w)} windows of {args.length} of {name}" for name, w in judged.items())
    text = (f"{Checkpoint(args.ckpt).name} at ratio {args.ratio}, {args.steps} steps of "
            f"{args.batch} x {args.length} tokens, judged on {kinds}; trained in "
            f"{args.dtype}, judged in float32, seeds 0 to "
            f"{max(row['seed'] for row in rows)}, {args.device}, torch {torch.__version__}, commit "
            f"{', '.join(sorted({row['commit'] for row in rows}))}\n\n"
            f"`python -m compare.recovery {shlex.join(sys.argv[1:])}`\n\n{table(rows, dense)}")
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nwrote {args.out}; {figure(rows, args.out)}")


if __name__ == "__main__":
    console.run(main)
