"""Draw the pictures of the documents into docs/. Needs matplotlib.

Sketches of the method and of the fit, the recorded results of the real LLM, and what each step
does to the bundled checkpoint.

    python -m docs.draw              about two minutes on two CPU cores
"""
import argparse
import json
import math
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

import console
from calibrate import Measurement, measure, read_tokens
from checkpoint.reader import Checkpoint
from compare.network import whole
from console import picture
from console.options import defaults
from demo.tour import WINDOWS, variants
from evaluate import losses, probe, relative_error, through, windows_of
from flatten import (
    BUNDLED,
    flatten_blocks,
    merge_groups,
    merges_for_ratio,
    paper,
    select_groups,
    selection,
)
from model import Runner, embed, load
from prune import of_block, prune_attention
from text.tokenizer import load_tokenizer
from text.wikitext import PYTHON, evaluation_text

HERE = Path(__file__).parent
RESULTS = HERE.parent / "compare" / "results" / "smollm2" / "results.jsonl"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
LOOPS = RESULTS.parents[1] / "loops.jsonl"
BLUE, ORANGE, GREEN, GREY, INK = "#4878a8", "#d98032", "#6a9a58", "#c8c8c8", "#444444"
LIGHT = "#ecc096"  # orange
UNIT = 0.4  # width of a head in the sketch of the method


def box(ax, x: float, y: float, width: float, height: float, color: str,
        label: str = "") -> None:
    """A filled box with a label in its middle."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white",
                           linewidth=1.5))
    ax.text(x + width / 2, y + height / 2, label, ha="center", va="center", color="white",
            fontsize=9)


def arrow(ax, start: tuple[float, float], end: tuple[float, float], style: str = "-") -> None:
    """A thin arrow from one point to another."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK,
                                 linewidth=1, linestyle=style, shrinkA=0, shrinkB=0))


def line(ax, *points: tuple[float, float]) -> None:
    """A thin line through these points."""
    ax.plot(*zip(*points, strict=True), color=INK, linewidth=1, solid_capstyle="butt")


def plus(ax, x: float, y: float) -> None:
    """The sign of an addition to the stream."""
    ax.plot(x, y, marker="o", markersize=13, color="white", markeredgecolor=INK, zorder=3)
    ax.text(x, y - 0.01, "+", ha="center", va="center", fontsize=12, color=INK, zorder=4)


def note(ax, x: float, y: float, text: str, **style) -> None:
    """A small grey text."""
    ax.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 8, "color": INK} | style)


def half(ax, x: float, y: float, parts: list[tuple[str, int]], heads: bool) -> None:
    """One half of a block, attention or MLP, beside the stream at x; its output is added above it.

    `parts` are (colour, heads) of each member. Attention is drawn as its heads, the MLP as bars.
    """
    at, width = x + 0.55, sum(number for _, number in parts) * UNIT
    middle = at + width / 2
    line(ax, (x, y), (middle, y))
    arrow(ax, (middle, y), (middle, y + 0.22))
    for color, number in parts:
        for k in range(number if heads else 1):
            size = UNIT if heads else number * UNIT
            box(ax, at + k * size, y + 0.22, size, 0.5, color)
        at += number * UNIT
    line(ax, (middle, y + 0.72), (middle, y + 0.95))
    arrow(ax, (middle, y + 0.95), (x + 0.13, y + 0.95))
    plus(ax, x, y + 0.95)
    note(ax, at + 0.1, y + 0.47, "attention" if heads else "MLP", ha="left")


def stream(ax, x: float, blocks: list[list[tuple[str, int]]], bottom: float) -> None:
    """The residual stream, going up at x, with blocks beside it."""
    top = bottom + 2.5 * len(blocks)
    arrow(ax, (x, bottom - 0.3), (x, top + 0.25))
    note(ax, x, bottom - 0.5, "x", fontsize=11)
    for k, parts in enumerate(blocks):
        half(ax, x, bottom + 2.5 * k, parts, heads=True)
        half(ax, x, bottom + 2.5 * k + 1.25, parts, heads=False)


def pipeline(path: Path) -> None:
    """Two blocks beside the stream, one wide block, one block of the original width."""
    fig, ax = plt.subplots(figsize=(10.5, 4.0))
    stream(ax, 0.0, [[(BLUE, 4)], [(ORANGE, 4)]], 0.0)
    note(ax, 0.0, 5.55, "y", fontsize=11)
    for y, color, name in ((1.1, BLUE, "block 1"), (3.6, ORANGE, "block 2")):
        note(ax, -0.45, y, name, color=color, rotation=90, fontsize=10, weight="bold")
    arrow(ax, (3.6, 2.6), (5.2, 2.6))
    note(ax, 4.4, 2.85, "flatten", fontsize=11, weight="bold")
    note(ax, 4.4, 1.95, "fold the norms,\nput heads and\nchannels side\nby side")
    stream(ax, 5.9, [[(BLUE, 4), (ORANGE, 4)]], 1.35)
    note(ax, 5.9, 4.4, "≈ y", fontsize=11)
    note(ax, 7.9, 0.35, "one block, twice as wide:\nboth members read the same x", fontsize=9)
    arrow(ax, (11.2, 2.6), (12.8, 2.6))
    note(ax, 12.0, 2.85, "prune", fontsize=11, weight="bold")
    note(ax, 12.0, 2.1, "keep the best,\nfold the others\ninto them")
    stream(ax, 13.5, [[(BLUE, 1), (ORANGE, 3)]], 1.35)
    note(ax, 13.5, 4.4, "≈ y", fontsize=11)
    note(ax, 14.85, 0.35, "one block of\nordinary width", fontsize=9)
    ax.set_xlim(-0.7, 16.8)
    ax.set_ylim(-0.75, 5.8)
    ax.axis("off")
    save(fig, path)


def beyond(path: Path) -> None:
    """The dense model's stream above the compressed one, and what is fitted to what."""
    fig, ax = plt.subplots(figsize=(9.5, 3.9))
    top, low = 2.75, 0.2                            # the two streams go from left to right
    arrow(ax, (0.4, top), (6.2, top))
    arrow(ax, (0.4, low), (6.2, low))
    note(ax, -0.3, top, "dense model", ha="right", fontsize=9)
    note(ax, -0.3, low, "compressed\nmodel", ha="right", fontsize=9)
    for x, y, name in ((0.15, top, "$x_1$"), (3.3, top + 0.2, "$x_2$"), (6.4, top, "$y$"),
                       (0.15, low, "$u$"), (6.45, low, "$y'$")):
        note(ax, x, y, name, fontsize=12)
    for x, color, name in ((0.7, BLUE, "block 1"), (3.7, ORANGE, "block 2")):
        line(ax, (x, top), (x, top + 0.65))
        arrow(ax, (x, top + 0.65), (x + 0.3, top + 0.65))
        box(ax, x + 0.3, top + 0.35, 1.4, 0.6, color, name)
        line(ax, (x + 1.7, top + 0.65), (x + 2.0, top + 0.65))
        arrow(ax, (x + 2.0, top + 0.65), (x + 2.0, top + 0.13))
        plus(ax, x + 2.0, top)
    line(ax, (0.7, low), (0.7, low + 0.65))
    arrow(ax, (0.7, low + 0.65), (1.0, low + 0.65))
    box(ax, 1.0, low + 0.35, 2.2, 0.6, BLUE, "member 1")
    box(ax, 3.2, low + 0.35, 2.2, 0.6, ORANGE, "member 2")
    line(ax, (5.4, low + 0.65), (5.7, low + 0.65))
    arrow(ax, (5.7, low + 0.65), (5.7, low + 0.13))
    plus(ax, 5.7, low)
    note(ax, 3.2, low - 0.3, "one block of ordinary width beside the stream", fontsize=9)
    for x, end, number in ((0.15, 1.35, 1), (3.3, 3.55, 2)):
        arrow(ax, (x, top - 0.2), (end, low + 1.0), "--")
        note(ax, end + 0.15, 1.75, f"align: $M_{number}$ turns\n$N(u)$ into $N(x_{number})$",
             ha="left")
    arrow(ax, (6.4, top - 0.2), (6.4, low + 0.25), "--")
    note(ax, 6.6, 1.5, "fit: v_proj, o_proj,\nup_proj, down_proj\nbring $y'$ to $y$", ha="left")
    ax.set_xlim(-1.5, 8.3)
    ax.set_ylim(-0.3, 3.8)
    ax.axis("off")
    save(fig, path)


def gradient_norms(tokens: Tensor) -> list[float]:
    """Norm of the loss's gradient for each block's weights, on the calibration tokens (N, T)."""
    net = load(BUNDLED, dtype=torch.float32).requires_grad_(True)
    for part in tokens.split(8):
        logits = net(part)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
        (loss * len(part) / len(tokens)).backward()
    return [float(torch.stack([p.grad.norm() for p in block.parameters()]).norm())
            for block in net.model["layers"]]


def motivation(path: Path, found: Measurement, gradients: list[float]) -> None:
    """Why it works: the stream grows with depth, what blocks add does not, nor do gradients."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    axes[0].semilogy(found.variance, color=BLUE)
    axes[0].set_title("variance of the stream", fontsize=9)
    axes[1].plot(found.attention, color=BLUE, label="attention")
    axes[1].plot(found.mlp, color=ORANGE, label="MLP")
    axes[1].set_yscale("log")
    axes[1].set_title("norm of the output / norm of the stream", fontsize=9)
    axes[1].legend(frameon=False, fontsize=8)
    axes[2].semilogy(gradients, color=BLUE)
    axes[2].set_title("norm of the gradient", fontsize=9)
    for ax in axes:
        ax.set_xlabel("block", fontsize=8)
        ax.tick_params(which="both", labelsize=7)
    save(fig, path)


def similarity(path: Path, S: Tensor, groups: list[list[int]]) -> None:
    """S as a heat map with the chosen groups outlined."""
    fig, ax = plt.subplots(figsize=(4.6, 3.8))
    picture.similarity(ax, S, groups)
    save(fig, path)


def group_errors(source: Checkpoint, groups: list[list[int]], tokens: Tensor,
                 runner: Runner) -> dict[str, list[float]]:
    """Relative error of each merged block after flattening, cutting heads and channels, repair."""
    xs, config = embed(source.outer(), tokens, runner.dtype), source.config
    errors = {name: [] for name in ("flattening", "heads cut", "channels cut", "compensated")}
    blocks = merge_groups(source, groups, xs, runner, *paper(runner, 10.0))
    for group in groups:
        start = probe(xs)
        pruned, kept = next(blocks)
        if len(group) == 1:
            continue
        members = [source.block(i) for i in group]
        target, wide = through(members, start, runner), flatten_blocks(members)
        heads = of_block(kept["kv_heads"], config.num_key_value_heads)
        steps = (wide, prune_attention(wide, heads, config), selection(wide, kept, config),
                 pruned)
        for name, weights in zip(errors, steps, strict=True):
            made = through([weights], start, runner)
            errors[name].append(relative_error(made, target, start))
    return errors


def errors_by_group(path: Path, errors: dict[str, list[float]], labels: list[str]) -> None:
    """Where the error of each merged block comes from."""
    fig, ax = plt.subplots(figsize=(7, 2.8))
    for k, (name, values) in enumerate(errors.items()):
        places = [i + (k - 1.5) * 0.2 for i in range(len(values))]
        ax.bar(places, values, 0.2, label=name, color=(GREY, "#8fb0cf", BLUE, ORANGE)[k])
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlabel("joined blocks")
    ax.set_ylabel("relative error")
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, 1.18))
    save(fig, path)


def curves(source: Checkpoint, tokens: Tensor, runner: Runner,
           windows: Tensor) -> dict[str, list[tuple[float, float]]]:
    """{method: (share of parameters removed, held-out perplexity) for each ratio}."""
    points = {}
    for ratio in RATIOS:
        _, models = variants(source, ratio, None, 10.0, tokens, runner)
        merges = merges_for_ratio(source.config, ratio, source.config.num_hidden_layers)
        share = merges * source.config.block_parameters() / source.config.parameters()
        for name, network in models.items():
            score = math.exp(losses(whole(network, runner), windows, "cpu").double().mean())
            points.setdefault(name, []).append((0 if name == "dense" else share, score))
    return points


def perplexity_by_ratio(path: Path, points: dict[str, list[tuple[float, float]]]) -> None:
    """Held-out perplexity against the share removed (of the wide model: what pruning would)."""
    fig, ax = plt.subplots(figsize=(6, 3.4))
    dense = points["dense"][0]
    names = ("blocks dropped (ShortGPT)", "flattened only (wide)", "flattened and pruned")
    for name, color in zip(names, (GREY, BLUE, ORANGE), strict=True):
        ax.plot(*zip(dense, *points[name], strict=True), marker="o", color=color, label=name)
    ax.set_xlabel("share of all parameters removed")
    ax.set_ylabel("held-out perplexity")
    ax.legend(frameon=False, fontsize=8)
    save(fig, path)


def real_llm(path: Path, rows: list[dict]) -> None:
    """Perplexity of the real LLM against the share of parameters removed, a line for each method.

    `rows` are those of a results.jsonl that `python -m compare` wrote.
    """
    dense = next(row for row in rows if row["method"] == "dense")
    text = next(iter(dense["perplexity"]))
    fig, ax = plt.subplots(figsize=(6.4, 3.4))
    for name, method, color in (("the paper", "flattengpt", BLUE),
                                ("blocks dropped (ShortGPT)", "shortgpt", GREY),
                                ("control: dropped, what stays fitted", "drop-refit", GREEN),
                                ("the fit by similarity", "flat-refit", LIGHT),
                                ("the fit (ours, without training)", "flat-refit-damage", ORANGE)):
        points = sorted((row["removed"], row["perplexity"][text]) for row in [dense, *rows]
                        if row is dense or (row["method"] == method and "error" not in row))
        ax.plot(*zip(*points, strict=True), marker="o", color=color, label=name)
    ax.axhline(dense["perplexity"][text], color=INK, linewidth=1, linestyle=":", label="dense")
    ax.set(xlabel="share of all parameters removed", ylabel=f"perplexity, {text}", yscale="log")
    ax.set_yticks([30, 100, 300, 1000, 3000], ["30", "100", "300", "1000", "3000"])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    save(fig, path)


def loops(path: Path, rows: list[dict]) -> None:
    """What each pass of a trained loop does to a model: the loss, and how many tokens get better.

    `rows` are those of python -m beyond.recursion --rows, of one model. Plain training is passes
    = 1.
    """
    fig, (loss, share) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for row in rows:
        if row["passes"] == 1:
            loss.axhline(row["losses"][0], color=INK, linewidth=1, linestyle=":")
            loss.text(1, row["losses"][0], "plain training", fontsize=8, color=INK, va="bottom")
            continue
        name, color = (("LoRA, no connector", GREY) if row["no_connector"] else
                       ("LoRA, connectors, beta 1", GREEN) if row["beta"] == 1 else
                       ("LoRA, connectors", ORANGE) if row["lora"] else ("connectors", BLUE))
        passes = range(1, len(row["losses"]) + 1)
        loss.plot(passes, row["losses"], marker="o", color=color, label=name)
        share.plot(passes, row["improved"], marker="o", color=color, label=name)
    share.plot(passes, [0.5 ** (r - 1) for r in passes], color=INK, linewidth=1, linestyle=":",
               label="a coin")
    low = min(row["losses"][0] for row in rows)
    loss.set(xlabel="pass", ylabel="loss, nats a token", xticks=passes, ylim=(low - 0.1, low + 0.5))
    share.set(xlabel="pass", ylabel="tokens better at every pass", xticks=passes, ylim=(0, 1.05))
    share.yaxis.set_major_formatter("{x:.0%}")
    share.legend(frameon=False, fontsize=8)
    save(fig, path)


def loss_curve(path: Path, rows: list[dict]) -> None:
    """Loss of the bundled checkpoint during training."""
    fig, ax = plt.subplots(figsize=(6, 2.8))
    for name, color in (("train", GREY), ("held_out", ORANGE)):
        ax.plot([row["tokens"] / 1e6 for row in rows], [row[name] for row in rows], color=color,
                label=name)
    ax.set_xlabel("million tokens")
    ax.set_ylabel("loss per token")
    ax.legend(frameon=False)
    save(fig, path)


def save(fig, path: Path) -> None:
    fig.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(fig)


def read_rows(path: Path) -> list[dict]:
    """The objects in a file of JSON lines."""
    return [json.loads(row) for row in path.read_text().splitlines()]


def main() -> None:
    console.parser("Draw the pictures of the documents.", __doc__).parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "flattengpt"  # the same figure, the same file
    pipeline(HERE / "pipeline.svg")
    beyond(HERE / "beyond.svg")
    real_llm(HERE / "smollm2.svg", read_rows(RESULTS))
    loops(HERE / "loops.svg", read_rows(LOOPS))
    loss_curve(HERE / "loss.svg", read_rows(BUNDLED.with_name("loss.jsonl")))
    args = argparse.Namespace(data=PYTHON, samples=64, length=256, seed=None, ridge=None)
    defaults(args)
    source, (tokens, _) = Checkpoint(BUNDLED), read_tokens(BUNDLED, args)
    runner = Runner(source.config, args.length, "cpu", torch.float32)
    found = measure(source, tokens, runner)
    L = source.config.num_hidden_layers
    groups = select_groups(found.S, merges_for_ratio(source.config, 0.2, L), L)
    motivation(HERE / "motivation.svg", found, gradient_norms(tokens))
    similarity(HERE / "similarity.svg", found.S, groups)
    labels = ["+".join(map(str, group)) for group in groups if len(group) > 1]
    errors = group_errors(source, groups, tokens, runner)
    errors_by_group(HERE / "errors.svg", errors, labels)
    text, _ = evaluation_text(PYTHON)
    windows = windows_of(torch.tensor(load_tokenizer(BUNDLED).encode(text)), args.length)
    windows = windows[::max(1, len(windows) // WINDOWS)][:WINDOWS]
    perplexity_by_ratio(HERE / "perplexity.svg", curves(source, tokens, runner, windows))


if __name__ == "__main__":
    console.run(main)
