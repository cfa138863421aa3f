"""Results as tables and figures: seeds summarised, methods side by side."""
import math
import statistics
from pathlib import Path

from compare.methods import METHODS
from compare.rows import DENSE, dense_row, finished

# what the legend of a figure calls a method, where its name says too little
LABELS = {"shortgpt": "blocks dropped (ShortGPT)", "flattengpt": "the paper (FlattenGPT)",
          "drop-refit": "blocks dropped, their neighbours fitted",
          "flat-refit": "ours: fitted, grouped by similarity",
          "flat-refit-damage": "ours: fitted, grouped by damage"}


def summary(values: list[float], digits: int = 2) -> str:
    """Return the mean as text, with the standard deviation over seeds if there are several."""
    mean = statistics.mean(values)
    form = f".{digits}f" if mean < 1000 else ",.0f"
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean:{form}}{deviation}"


def excess(row: dict, dense: dict, name: str) -> float:
    """Return what compression has cost on a text, in nats a token.

    It is the logarithm of the row's perplexity over the dense model's.
    """
    return math.log(row["perplexity"][name] / dense["perplexity"][name])


def table(rows: list[dict], texts: list[str]) -> str:
    """Return a Markdown table: one line for each method and ratio, seeds summarised, best first.

    After each perplexity comes the excess over the dense model, in nats a token. Rows of earlier
    versions have no agreement and no divergence.
    """
    dense, groups = dense_row(rows), {}
    for row in rows:
        groups.setdefault((row["ratio"], row["method"]), []).append(row)

    def order(ratio_and_method: tuple[float, str]) -> tuple[float, float]:
        good = finished(groups[ratio_and_method])
        mean = statistics.mean(row["perplexity"][texts[0]] for row in good) if good else math.inf
        return ratio_and_method[0], mean
    head = ["ratio asked", "method", "source", "removed", "blocks",
            *(f"perplexity, {name}" for name in texts), "agreement", "divergence", "passes",
            "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for ratio, method in sorted(groups, key=order):
        same = groups[ratio, method]
        good, errors = finished(same), [row["error"] for row in same if "error" in row]
        source = METHODS[method][1] if method in METHODS else ""
        start = f"| {ratio or ''} | {method} | {source} | "
        if not good:
            lines.append(f"{start}failed: {errors[0]} |" + " |" * (5 + len(texts)))
            continue
        removed = f"{statistics.mean(row['removed'] for row in good):.4f}"
        if errors:
            removed += f" ({len(errors)} of {len(same)} seeds failed: {errors[0]})"
        cost = []
        for name in texts:
            cost.append(summary([row["perplexity"][name] for row in good]))
            if dense and method != DENSE:
                cost[-1] += f" ({statistics.mean(excess(row, dense, name) for row in good):+.4f})"
        known = [row for row in good if "agreement" in row]
        close = [summary([row[what] for row in known], 3) if known else ""
                 for what in ("agreement", "divergence")]
        passes, seconds = (f"{statistics.mean(row[what] for row in good):.1f}"
                           for what in ("passes", "seconds"))
        values = [removed, str(good[0]["blocks"]), *cost, *close, passes, seconds]
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


def curve(rows: list[dict], method: str, quantity: str, text: str) -> list[tuple[float, float]]:
    """Return a method's points (quantity, perplexity), one a ratio: means over seeds."""
    ratios = {}
    for row in rows:
        if row["method"] == method:
            ratios.setdefault(row["ratio"], []).append((row[quantity], row["perplexity"][text]))
    return sorted(tuple(map(statistics.mean, zip(*seeds, strict=True)))
                  for seeds in ratios.values())


def figures(rows: list[dict], text: str, out: Path) -> str:
    """Draw perplexity against parameters removed and against seconds. Says what was drawn.

    Lines against parameters start at the dense model.
    """
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import LogFormatter
    except ImportError:
        return "no figures: they need matplotlib (pip install matplotlib)"
    dense, good = dense_row(rows), [row for row in finished(rows) if row["method"] != DENSE]
    if not good:
        return "nothing to draw"
    matplotlib.rcParams["svg.hashsalt"] = "flattengpt"  # the same drawing, the same bytes
    methods = list(dict.fromkeys(row["method"] for row in good))
    few = len(methods) <= 12
    for quantity, label, scale, line in (
            ("removed", "share of all parameters removed", "linear", "-"),
            ("seconds", "seconds of compression", "log", "")):
        fig, ax = plt.subplots(figsize=(8, 4 if few else 5), layout="constrained")
        start = [(0.0, dense["perplexity"][text])] if dense and line else []
        for number, method in enumerate(methods):
            points = start + curve(good, method, quantity, text)
            ax.plot(*zip(*points, strict=True), marker="osv^Dx+*"[number % 8], markersize=5,
                    linestyle=line, linewidth=1.5 if few else 0.8,
                    label=LABELS.get(method, method))
        if dense:
            ax.axhline(dense["perplexity"][text], color="#444444", linewidth=1, linestyle=":",
                       label="dense")
        ax.set(xlabel=label, ylabel=f"perplexity, {text}", yscale="log", xscale=scale)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(LogFormatter())  # 30, not 3 × 10¹
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        if quantity == "removed":
            ax.xaxis.set_major_formatter("{x:.0%}")
        ax.legend(fontsize=9 if few else 6, ncols=1 if few else 2, loc="upper left",
                  bbox_to_anchor=(1, 1), frameon=False)
        fig.savefig(out / f"{quantity}.svg", metadata={"Date": None})
        plt.close(fig)
    return f"figures: {out}/removed.svg, {out}/seconds.svg"
