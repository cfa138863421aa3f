"""Draw the README's figures: a sketch of the method, and what it does to the bundled checkpoint. Needs matplotlib.

    python -m figures.draw              all of them, into figures/; about two minutes on two CPU cores
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
from baselines.network import whole
from calibrate import Measurement, Runner, defaults, embed, measure, read_tokens
from checkpoint.reader import Checkpoint
from demo.tour import BUNDLED, WINDOWS, variants
from evaluate import losses, windows_of
from flatten import flatten_blocks, merges_for_ratio, select_groups
from model import load
from prune import probe, prune_attention, prune_block, relative_error, through
from text.tokenizer import load_tokenizer
from text.wikitext import PYTHON, evaluation_text

HERE = Path(__file__).parent
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
BLUE, ORANGE, GREY = "#4878a8", "#d98032", "#c8c8c8"


def box(ax, x: float, y: float, width: float, height: float, color: str, label: str = "", alpha: float = 1.0) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5, alpha=alpha))
    ax.text(x + width / 2, y + height / 2, label, ha="center", va="center", color="white", fontsize=9)


def arrow(ax, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#555555", linewidth=1))


def block(ax, x: float, y: float, parts: list[tuple[str, int]], unit: float, label: str) -> float:
    """One block at (x, y): a row of heads below, a row of channels above, (colour, number) of each. Returns its width."""
    at = x
    for color, number in parts:
        for k in range(number):
            box(ax, at + k * unit, y, unit, 0.5, color)
        box(ax, at, y + 0.55, number * unit, 0.5, color)
        at += number * unit
    ax.text(x - 0.08, y + 0.25, "heads", ha="right", va="center", fontsize=7, color="#555555")
    ax.text(x - 0.08, y + 0.8, "MLP", ha="right", va="center", fontsize=7, color="#555555")
    ax.text(x, y + 1.12, label, ha="left", va="bottom", fontsize=9)
    return at - x


def pipeline(path: Path) -> None:
    """Two blocks, one wide block, one block of the original width."""
    fig, ax = plt.subplots(figsize=(9.5, 3.1))
    unit = 0.3
    block(ax, 0.6, 0.2, [(BLUE, 4)], unit, "block 1")
    block(ax, 0.6, 2.0, [(ORANGE, 4)], unit, "block 2")
    arrow(ax, (1.65, -0.35), (1.65, 0.15))
    arrow(ax, (1.65, 1.3), (1.65, 1.95))
    arrow(ax, (1.65, 3.1), (1.65, 3.8))
    ax.text(2.55, 1.75, "flatten\nfold the norms,\nconcatenate", ha="center", va="center", fontsize=9)
    arrow(ax, (1.95, 1.25), (3.35, 1.25))
    block(ax, 3.9, 0.9, [(BLUE, 4), (ORANGE, 4)], unit, "one block,\ntwice as wide")
    arrow(ax, (6.1, -0.35), (6.1, 0.85))
    arrow(ax, (6.1, 2.0), (6.1, 3.8))
    ax.text(7.2, 1.75, "prune\nkeep the best,\nfold in the rest", ha="center", va="center", fontsize=9)
    arrow(ax, (6.45, 1.25), (8.0, 1.25))
    block(ax, 8.5, 0.9, [(BLUE, 1), (ORANGE, 3)], unit, "original\nwidth")
    arrow(ax, (9.55, -0.35), (9.55, 0.85))
    arrow(ax, (9.55, 2.0), (9.55, 3.8))
    ax.set_xlim(0, 10.1)
    ax.set_ylim(-0.45, 3.9)
    ax.axis("off")
    save(fig, path)


def beyond(path: Path) -> None:
    """The dense model's streams beside the compressed one, and what is fitted to what."""
    fig, ax = plt.subplots(figsize=(9.5, 2.9))
    for x, label in ((0.0, "x1"), (3.1, "x2"), (6.2, "y")):
        ax.text(x, 2.3, label, ha="center", va="center", fontsize=11)
    for x, color, label in ((0.75, BLUE, "block 1"), (3.85, ORANGE, "block 2")):
        box(ax, x, 1.95, 1.6, 0.7, color, label)
        arrow(ax, (x - 0.5, 2.3), (x, 2.3))
        arrow(ax, (x + 1.6, 2.3), (x + 2.15, 2.3))
    ax.text(-0.6, 2.3, "dense", ha="right", va="center", fontsize=9)
    ax.text(-0.6, 0.35, "compressed", ha="right", va="center", fontsize=9)
    ax.text(0, 0.35, "u", ha="center", va="center", fontsize=11)
    arrow(ax, (0.25, 0.35), (0.75, 0.35))
    box(ax, 0.75, 0.0, 2.35, 0.7, BLUE)
    box(ax, 3.1, 0.0, 2.35, 0.7, ORANGE)
    ax.text(3.1, 0.35, "one block of ordinary width", ha="center", va="center", fontsize=9, color="white")
    arrow(ax, (5.45, 0.35), (6.0, 0.35))
    ax.text(6.2, 0.35, "y'", ha="center", va="center", fontsize=11)
    for x, target, label in ((1.6, 0.0, "align: M1 makes\nN(x1) of N(u)"), (4.4, 3.1, "align: M2 makes\nN(x2) of N(u)")):
        arrow(ax, (target, 2.1), (x - 0.4, 0.75))
        ax.text(x - 0.3, 1.3, label, ha="left", va="center", fontsize=8, color="#555555")
    arrow(ax, (6.2, 2.1), (6.2, 0.55))
    ax.text(6.35, 1.3, "fit: o_proj and down_proj,\nv_proj and up_proj\nbring y' to y", ha="left", va="center", fontsize=8,
            color="#555555")
    ax.set_xlim(-1.8, 8.8)
    ax.set_ylim(-0.1, 2.75)
    ax.axis("off")
    save(fig, path)


def gradient_norms(tokens: Tensor) -> list[float]:
    """Norm of the loss's gradient with respect to each block's weights, on the calibration tokens (N, T)."""
    net = load(BUNDLED, dtype=torch.float32).requires_grad_(True)
    for part in tokens.split(8):
        logits = net(part)[:, :-1]
        (F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) * len(part) / len(tokens)).backward()
    return [float(torch.stack([p.grad.norm() for p in block.parameters()]).norm()) for block in net.model["layers"]]


def motivation(path: Path, found: Measurement, gradients: list[float]) -> None:
    """Why it works: the stream grows with depth and what blocks add does not keep up; and the gradient of each block."""
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
    image = ax.imshow(S, cmap="viridis", vmin=float(S[1:, 1:].min()), vmax=1)
    for group in groups:
        if len(group) > 1:
            ax.add_patch(Rectangle((group[0] - 0.5, group[0] - 0.5), len(group), len(group), fill=False, edgecolor=ORANGE,
                                   linewidth=2))
    fig.colorbar(image, label="cosine similarity of block inputs")
    ax.set_xlabel("block")
    ax.set_ylabel("block")
    save(fig, path)


def group_errors(source: Checkpoint, groups: list[list[int]], tokens: Tensor, runner: Runner) -> dict[str, list[float]]:
    """Relative error of each merged block after flattening, after cutting heads, cutting channels, and compensation."""
    xs, config = embed(source.outer(), tokens, runner.dtype), source.config
    errors = {name: [] for name in ("flattening", "heads cut", "channels cut", "compensated")}
    for group in groups:
        members = [source.block(i) for i in group]
        wide = flatten_blocks(members)
        if len(group) == 1:
            runner.run_block(wide, xs)
            continue
        start = probe(xs)
        target = through(members, start, runner)
        pruned, selected, kept = prune_block(wide, xs, runner, 10.0)
        heads = torch.tensor([member * config.num_key_value_heads + j
                              for member, chosen in enumerate(kept["kv_heads"]) for j in chosen])
        steps = (wide, prune_attention(wide, heads, config), selected, pruned)
        for name, weights in zip(errors, steps, strict=True):
            errors[name].append(relative_error(through([weights], start, runner), target, start))
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


def curves(source: Checkpoint, tokens: Tensor, runner: Runner, windows: Tensor) -> dict[str, list[tuple[float, float]]]:
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
    """Held-out perplexity against the share of parameters removed (for the wide model: that pruning would remove)."""
    fig, ax = plt.subplots(figsize=(6, 3.4))
    dense = points["dense"][0]
    names = ("blocks dropped (ShortGPT)", "flattened only (wide)", "flattened and pruned")
    for name, color in zip(names, (GREY, BLUE, ORANGE), strict=True):
        ax.plot(*zip(dense, *points[name], strict=True), marker="o", color=color, label=name)
    ax.set_xlabel("share of all parameters removed")
    ax.set_ylabel("held-out perplexity")
    ax.legend(frameon=False, fontsize=8)
    save(fig, path)


def loss_curve(path: Path, rows: list[dict]) -> None:
    """Loss of the bundled checkpoint during training."""
    fig, ax = plt.subplots(figsize=(6, 2.8))
    for name, color in (("train", GREY), ("held_out", ORANGE)):
        ax.plot([row["tokens"] / 1e6 for row in rows], [row[name] for row in rows], color=color, label=name)
    ax.set_xlabel("million tokens")
    ax.set_ylabel("loss per token")
    ax.legend(frameon=False)
    save(fig, path)


def save(fig, path: Path) -> None:
    fig.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(fig)


def main() -> None:
    console.parser("Draw the README's figures.", __doc__).parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "flattengpt"  # the same figure, the same file
    pipeline(HERE / "pipeline.svg")
    beyond(HERE / "beyond.svg")
    loss_curve(HERE / "loss.svg", [json.loads(line) for line in (BUNDLED.parent / "loss.jsonl").read_text().splitlines()])
    args = argparse.Namespace(data=PYTHON, samples=64, length=256, seed=None, ridge=None)
    defaults(args)
    source, (tokens, _) = Checkpoint(BUNDLED), read_tokens(BUNDLED, args)
    runner = Runner(source, args.length, "cpu", torch.float32)
    found = measure(source, tokens, runner)
    L = source.config.num_hidden_layers
    groups = select_groups(found.S, merges_for_ratio(source.config, 0.2, L), L)
    motivation(HERE / "motivation.svg", found, gradient_norms(tokens))
    similarity(HERE / "similarity.svg", found.S, groups)
    labels = ["+".join(map(str, group)) for group in groups if len(group) > 1]
    errors_by_group(HERE / "errors.svg", group_errors(source, groups, tokens, runner), labels)
    text, _ = evaluation_text(PYTHON)
    windows = windows_of(torch.tensor(load_tokenizer(BUNDLED).encode(text)), args.length)
    windows = windows[::max(1, len(windows) // WINDOWS)][:WINDOWS]
    perplexity_by_ratio(HERE / "perplexity.svg", curves(source, tokens, runner, windows))


if __name__ == "__main__":
    main()
