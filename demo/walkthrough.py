"""Run the code of WALKTHROUGH.md from top to bottom, and put what each piece prints below it.

    python -m demo.walkthrough          rewrites the outputs in demo/WALKTHROUGH.md; about 20 seconds
"""
import contextlib
import io
import platform
import re
from pathlib import Path

import console
from console import run

DOCUMENT = Path(__file__).with_name("WALKTHROUGH.md")
CELL = re.compile(r"(```python\n(.*?)```\n\n```text\n)(.*?)(```\n)", re.DOTALL)
VERSION = re.compile(r"CPython \d+\.\d+\.\d+")


def execute(document: str) -> tuple[str, list[tuple[str, str]]]:
    """(the document with fresh outputs, [(output as documented, fresh output)]). The pieces share their variables."""
    names, outputs = {}, []

    def cell(match: re.Match) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
            exec(compile(match[2], str(DOCUMENT), "exec"), names)
        outputs.append((match[3], printed.getvalue()))
        return match[1] + printed.getvalue() + match[4]
    return CELL.sub(cell, VERSION.sub(f"CPython {platform.python_version()}", document)), outputs


def main() -> None:
    console.parser("Renew the outputs in the walkthrough.", __doc__).parse_args()
    document, outputs = execute(DOCUMENT.read_text())
    partial = DOCUMENT.with_name(f".{DOCUMENT.name}.partial")
    partial.write_text(document)
    partial.replace(DOCUMENT)
    print(f"{DOCUMENT}: {len(outputs)} outputs, {sum(old != new for old, new in outputs)} of them changed")


if __name__ == "__main__":
    run(main)
