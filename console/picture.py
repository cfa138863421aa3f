"""The figure of a run: which blocks are alike and were joined, and what each step cost.

It is drawn with matplotlib, which a user may lack.
"""
import argparse
import io
import os
from pathlib import Path

from torch import Tensor

from console.report import ERRORS

COLORS = dict(zip(ERRORS, ("#c8c8c8", "#8fb0cf", "#4878a8", "#d98032"), strict=True))
ENDINGS = {"plot": (".svg", ".png"), "report": (".html",)}


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Add --plot and --report. `check_pictures` must follow."""
    parser.add_argument("--plot", type=Path, metavar="FILE",
                        help="draw S with the groups, and the errors of each group, into a .svg or "
                             ".png (needs matplotlib)")
    parser.add_argument("--report", type=Path, metavar="FILE",
                        help="write a page about the run, a .html (needs matplotlib; "
                             "perplexities and samples come with it unless --no-eval)")


def check_pictures(args: argparse.Namespace) -> None:
    """ValueError, before the long work, for a --plot or --report that could not be written."""
    for option, endings in ENDINGS.items():
        path = getattr(args, option)
        if path is None:
            continue
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError(f"--{option} draws with matplotlib, which is not installed; "
                             "python -m pip install matplotlib") from None
        if path.suffix.lower() not in endings:
            raise ValueError(f"--{option} {path} must end with {' or '.join(endings)}")
        if path.exists() and not (args.overwrite and path.is_file()):
            raise ValueError(f"--{option} {path} exists already; choose another name, or replace a "
                             "file with --overwrite")
        if args.out and path.absolute() in (args.out.absolute(), *args.out.absolute().parents):
            raise ValueError(f"--{option} {path} and --out {args.out} overlap; choose another name")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"--{option} {path}: {folder} is not a folder that can be written to")


def similarity(ax, S: Tensor, groups: list[list[int]]) -> None:
    """Draw S (L, L) as a heat map, with the groups of several blocks outlined."""
    from matplotlib.patches import Rectangle
    inner = S[1:, 1:] if len(S) > 2 else S  # the embeddings, which enter block 0, are like no other
    image = ax.imshow(S.numpy(), cmap="viridis", vmin=float(inner.min()), vmax=1)
    for group in groups:
        if len(group) > 1:
            corner, size = group[0] - 0.5, len(group)
            ax.add_patch(Rectangle((corner, corner), size, size, fill=False, linewidth=2,
                                   edgecolor=COLORS["refit"]))
    ax.figure.colorbar(image, ax=ax, label="cosine similarity of block inputs")
    ax.set(xlabel="block", ylabel="block")


def group_errors(ax, merged: list[dict]) -> None:
    """Draw the relative error of each merged group (its report) after each step, as bars."""
    names = [name for name in ERRORS if any(f"error_{name}" in group for group in merged)]
    for k, name in enumerate(names):
        places = [i + (k + 0.5) / (len(names) + 1) for i in range(len(merged))]
        ax.bar(places, [group[f"error_{name}"] for group in merged], 1 / (len(names) + 1),
               align="edge", label=name, color=COLORS[name])
    labels = [f"{group['blocks'][0]}-{group['blocks'][-1]}" for group in merged]
    ax.set_xticks([i + 0.5 for i in range(len(merged))], labels,
                  rotation=90 if len(merged) > 8 else 0)
    ax.set(xlabel="joined blocks", ylabel="relative error")
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))


def draw(S: Tensor, groups: list[dict], kind: str) -> bytes:
    """Draw the figure of a run, from S (L, L) and the reports of its groups. `kind`: svg or png."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context({"svg.hashsalt": "flattengpt"}):  # the same figure, the same file
        fig = Figure(figsize=(11, 4), layout="constrained")
        left, right = fig.subplots(1, 2, width_ratios=(1, 1.4))
        similarity(left, S, [group["blocks"] for group in groups])
        group_errors(right, [group for group in groups if len(group["blocks"]) > 1])
        file, nothing = io.BytesIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
        fig.savefig(file, format=kind, dpi=150, metadata=nothing if kind == "svg" else None)
    return file.getvalue()
