"""The walkthrough and its notebook run, and say what is so."""
import platform
import re

import pytest

from course.notebook import NOTEBOOK, notebook
from course.walkthrough import CELL, DOCUMENT, VERSION, execute, main

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def numbers(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def test_the_walkthrough_prints_what_it_says():
    """With another Python the library is another text, and numbers differ; lines do not."""
    document = DOCUMENT.read_text()
    _, outputs = execute(document)
    same_text = VERSION.search(document)[0] == f"CPython {platform.python_version()}"
    assert len(outputs) == document.count("```python") >= 8
    for documented, printed in outputs:
        assert documented.strip() and len(documented.splitlines()) == len(printed.splitlines())
        if same_text:
            assert NUMBER.sub("#", documented).split() == NUMBER.sub("#", printed).split()
            assert numbers(printed) == pytest.approx(numbers(documented), rel=0.02, abs=0.011)


def test_a_cell_that_prints_something_else_is_noticed():
    first = "```python\nx = 2\n```\n\n```text\n```\n"
    second = "```python\nprint(x + 1)\n```\n\n```text\n4\n```\n"
    renewed, outputs = execute(f"{first}\n{second}")
    assert outputs == [("", ""), ("4\n", "3\n")]
    assert "3\n```" in renewed and len(CELL.findall(renewed)) == 2


def test_a_section_shows_what_it_alone_prints_and_changes_nothing(cli):
    before = DOCUMENT.read_text()
    code, out, _ = cli(main, "--section", 3)
    assert code == 0 and out.startswith("6 merges remove") and out.count("after merge") == 6
    assert DOCUMENT.read_text() == before
    code, _, err = cli(main, "--section", 99)
    assert code == 2 and "no such section" in err and err.count("\n") == 1


def test_the_notebook_is_made_of_the_walkthrough():
    assert NOTEBOOK.read_text() == notebook(DOCUMENT.read_text()), "run python -m course.notebook"
    links = re.findall(r"\]\((?!http)([^)#]+)", NOTEBOOK.read_text())
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)


def test_the_notebook_runs_from_top_to_bottom():
    """Started in its own folder, as Jupyter does; it prints as many lines as it shows."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    shown = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(shown)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(fresh, timeout=600, resources={
        "metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    def printed(book):
        return [["".join(output.text for output in cell.outputs if output.get("name") == "stdout")]
                for cell in book.cells if cell.cell_type == "code"]
    assert any(map(any, printed(shown)))
    for (documented,), (now,) in zip(printed(shown), printed(fresh), strict=True):
        assert NUMBER.sub("#", documented).split()[:3] == NUMBER.sub("#", now).split()[:3]
        assert len(documented.splitlines()) == len(now.splitlines())
