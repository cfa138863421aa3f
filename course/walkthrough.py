"""Run the code of WALKTHROUGH.md from top to bottom, and put what each piece prints below it.

    python -m course.walkthrough        renews the outputs in course/WALKTHROUGH.md; 20 seconds
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


def main() -> None:
    console.parser("Renew the outputs in the walkthrough.", __doc__).parse_args()
    document, outputs = execute(DOCUMENT.read_text())
    partial = DOCUMENT.with_name(f".{DOCUMENT.name}.partial")
    partial.write_text(document)
    partial.replace(DOCUMENT)
    changed = sum(documented != fresh for documented, fresh in outputs)
    print(f"{DOCUMENT}: {len(outputs)} outputs, {changed} of them changed")


if __name__ == "__main__":
    console.run(main)
