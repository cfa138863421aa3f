"""The rows of results.jsonl: one for each cell, a method at one ratio with one seed."""
import json
import math
from pathlib import Path
from typing import NamedTuple

from text.wikitext import read

RESULTS = "results.jsonl"
DENSE = "dense"


class Cell(NamedTuple):
    """One method at one ratio with one seed of the calibration text."""
    method: str
    ratio: float
    seed: int


def cell_of(row: dict) -> Cell:
    """Return the cell that a row is about."""
    return Cell(row["method"], row["ratio"], row["seed"])


def finished(rows: list[dict]) -> list[dict]:
    """Leave out the rows of cells that failed."""
    return [row for row in rows if "error" not in row]


def dense_row(rows: list[dict]) -> dict | None:
    """Return the dense model's row; None if it is not there or failed."""
    return next((row for row in finished(rows) if row["method"] == DENSE), None)


def is_result(row: dict) -> bool:
    """Tell whether a row has the form in which this program writes one.

    Rows of earlier versions lack agreement and divergence.
    """
    try:
        types = [type(value) for value in (*cell_of(row), row["commit"], row["settings"])]
        if types != [str, float, int, str, dict]:
            return False
        if "error" in row:
            return isinstance(row["error"], str)
        numbers = [row[name] for name in ("parameters", "removed", "blocks", "seconds", "passes")]
        numbers += [row["agreement"], row["divergence"]] if "agreement" in row else []
        return isinstance(row["ordinary"], bool) and all(map(math.isfinite, numbers)) and all(
            row["perplexity"][name] > 0 for name in row["settings"]["windows"])
    except (KeyError, TypeError, OverflowError):
        return False


def read_rows(out: Path, settings: dict, repair: bool = True) -> list[dict]:
    """Return the finished cells of an earlier run into the folder `out` with the same settings.

    A last line that a kill has cut off is taken out of the file, unless another process may be
    writing it (repair=False). ValueError if the folder or the file holds anything else, or results
    with other settings.
    """
    path = out / RESULTS
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and is not a result of this program (no {RESULTS}); "
                             "choose another --out")
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
        if differ := [name for name in row["settings"] | settings
                      if row["settings"].get(name, ...) != settings.get(name, ...)]:
            there, here = ({name: facts.get(name) for name in differ}
                           for facts in (row["settings"], settings))
            raise ValueError(f"{path} holds results with other settings "
                             f"({json.dumps(there):.300} there, {json.dumps(here):.300} here); "
                             "choose another --out")
        rows[cell_of(row)] = row
    if cut_off and repair:
        path.write_text("".join(line + "\n" for line in lines))
    return list(rows.values())


def append_row(out: Path, row: dict) -> None:
    """Add a row to the results in a folder."""
    with open(out / RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
