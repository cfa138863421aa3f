"""Run the code of WALKTHROUGH.md from top to bottom, and put what each piece prints below it.

    python -m course.walkthrough                  renews the outputs in it; 20 seconds
    python -m course.walkthrough --section 3      runs sections 1 to 3, shows what the last prints
"""
import contextlib
import io
import platform
import re
from pathlib import Path

import console

DOCUMENT = Path(__file__).with_name("WALKTHROUGH.md")
CELL = re.compile(r"(```python\n(.*?)```\n\n```text\n)(.*?)(```\n)", re.DOTALL)
VERSION = re.compile(r"CPython \d+\.\d+\.\d+")


def execute(document: str) -> tuple[str, list[tuple[str, str]]]:
    """Run the pieces of code in the document; they share their variables.

    Returns the document with fresh outputs, and for each piece a pair (output as documented, fresh
    output).
    """
    names, outputs = {}, []

    def run(cell: re.Match) -> str:
        start, code, documented, end = cell.groups()
        with contextlib.redirect_stdout(io.StringIO()) as printed, \
                contextlib.redirect_stderr(io.StringIO()):
            exec(compile(code, str(DOCUMENT), "exec"), names)
        outputs.append((documented, printed.getvalue()))
        return start + printed.getvalue() + end
    document = VERSION.sub(f"CPython {platform.python_version()}", document)
    return CELL.sub(run, document), outputs


def section(number: int) -> str:
    """Run the walkthrough up to the end of a section. Returns what this section prints."""
    before, heading, rest = DOCUMENT.read_text().partition(f"\n## {number}. ")
    if not heading:
        raise ValueError(f"--section {number}: there is no such section in {DOCUMENT}")
    own = heading + rest.partition("\n## ")[0]
    _, outputs = execute(before + own)
    return "".join(printed for _, printed in outputs[-len(CELL.findall(own)):])


def main() -> None:
    parser = console.parser("Renew the outputs in the walkthrough.", __doc__)
    parser.add_argument("--section", type=int, help="show what this one prints, and change nothing")
    args = parser.parse_args()
    if args.section is not None:
        print(section(args.section), end="")
        return
    document, outputs = execute(DOCUMENT.read_text())
    partial = DOCUMENT.with_name(f".{DOCUMENT.name}.partial")
    partial.write_text(document)
    partial.replace(DOCUMENT)
    changed = sum(documented != fresh for documented, fresh in outputs)
    print(f"{DOCUMENT}: {len(outputs)} outputs, {changed} of them changed")


if __name__ == "__main__":
    console.run(main)
