"""A page of HTML about a run. It holds all that it shows: no script, nothing from elsewhere."""
from collections.abc import Iterable
from html import escape

from checkpoint.config import Config
from console.report import ERRORS, kept

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse }}
th, td {{ text-align: left; vertical-align: top; padding: 0.3em 1em 0.3em 0 }}
th, td {{ border-bottom: 1px solid #ccc; white-space: pre-wrap }}
code {{ overflow-wrap: anywhere }}
svg {{ width: 100%; height: auto }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{method}. Calibrated on {text}.</p>
<p><code>{command}</code></p>
<h2>Before and after</h2>
{sizes}
<p>{judged}</p>
<h2>Groups</h2>
{figure}
{groups}
<p>Errors are relative to what the blocks of a group add to the stream. That of a fit (refit) also
counts what earlier groups lost.</p>
{samples}
</body>
</html>
"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table. All cells are escaped."""
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    return "\n".join(["<table>", line(head, "th"), *(line(row, "td") for row in rows), "</table>"])


def group_table(groups: list[dict], config: Config) -> str:
    """Write the table of merged groups, from their reports. Columns that nobody fills are left out.
    """
    rows = []
    for group in groups:
        if len(group["blocks"]) > 1:
            row = {"blocks": "+".join(map(str, group["blocks"])),
                   "similarity": f"{group['similarity']:.3f}", **kept(group, config)}
            rows.append(row | {f"error, {name}": f"{group[f'error_{name}']:.1%}"
                               for name in ERRORS if f"error_{name}" in group})
    head = list(dict.fromkeys(name for row in rows for name in row))
    return table(head, [[row.get(name, "") for name in head] for row in rows])


def page(record: dict, config: Config, name: str, figure: bytes, scores: list[float], judged: str,
         prompt: str, samples: list[str]) -> str:
    """Write the page of a run.

    `record` is that of flatten.json, `config` the dense model's, `name` the result's, and `figure`
    an SVG. `scores` are perplexities on the text `judged`, and `samples` are the prompt and what
    follows, of the dense model and of the result. Both are empty if these were not compared.
    """
    names, groups = (record["source"], name), record["groups"]
    sizes = [[names[0], str(config.num_hidden_layers), f"{record['parameters_before']:,}"],
             [names[1], str(len(groups)), f"{record['parameters_after']:,}"]]
    if scores:
        sizes = [[*row, f"{score:.4f}"] for row, score in zip(sizes, scores, strict=True)]
        judged = f"Perplexity on {judged}."
    told = f"Ratio {record['ratio_reached']:.4f} (asked {record['ratio_asked']}). {judged}"
    head = ["checkpoint", "blocks", "parameters", "perplexity"][:len(sizes[0])]
    shown = (f"<h2>Greedy samples</h2>\n<p>Both go on from “{escape(prompt)}”.</p>\n"
             + table(names, [samples])) if samples else ""
    svg = figure.decode()
    return PAGE.format(
        title=escape(f"{names[0]}: {config.num_hidden_layers} to {len(groups)} blocks"),
        method=escape(record["method"]), text=escape(record["calibration"]["text"]),
        command=escape(record["command"]), sizes=table(head, sizes), judged=escape(told),
        figure=svg[svg.index("<svg"):],  # without what makes it a file of its own
        groups=group_table(groups, config), samples=shown)
