"""Draw the README's figures. Needs matplotlib.

    python -m figures.draw              all of them, into figures/
"""
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
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
    fig.savefig(path, bbox_inches="tight")
    plt.close(fig)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "flattengpt"  # the same figure, the same file
    pipeline(HERE / "pipeline.svg")


if __name__ == "__main__":
    main()
