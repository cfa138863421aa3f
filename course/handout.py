"""Write the student's copy of the project: exercised functions empty, no answers, no history.

Lines of documents and docstrings that give a solution away say which exercise they belong to,
instead. What a teacher keeps (answers, grader, equations written out) is not in the copy, and
nothing links to it.

    python course/handout.py OUT
"""
import ast
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a file that is run finds its own folder only

import console
from course.exercises import EXERCISES, ROOT, find, set_body

LEFT_OUT = {".git", ".venv", "out", "__pycache__", ".pytest_cache", ".ruff_cache"}
FOR_TEACHERS = {"course/ANSWERS.md", "course/exercises.py", "course/grade.py", "course/handout.py",
                "docs/teaching.md", "tests/test_equations.py", "tests/test_exercises.py"}
KEPT = "|".join(re.escape(Path(name).name) for name in FOR_TEACHERS)
LINK = re.compile(rf"\[([^]]*)\]\([^)]*(?:{KEPT})[^)]*\)")  # to what the copy lacks
STAND_INS = {  # bodies for functions whose own code is the answer of an exercise, or that all need
    ("beyond/regression.py", "cheapest"):
        'raise NotImplementedError("left out here, because it holds the answer of exercise 19")',
    ("beyond/regression.py", "eliminate"): "return eliminate_units(V, P.clone(), 1, keep)",
    ("parallel/__init__.py", "whole"): ('if ranks() == 1:\n        return values\n'
                                        '    raise NotImplementedError("exercise 20")')}


def handout(out: Path) -> None:
    """Write the copy into `out`. ValueError if `out` exists or lies inside the project."""
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder")
    if ROOT.resolve() in out.resolve().parents:
        raise ValueError(f"{out} is inside the project; choose a folder outside it")
    shutil.copytree(ROOT, out, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in FOR_TEACHERS:
        (out / name).unlink()
    bodies = {(exercise.file, exercise.function):
              f'raise NotImplementedError("exercise {exercise.number}")' for exercise in EXERCISES}
    for (file, function), body in (bodies | STAND_INS).items():
        path = out / file
        indent = " " * (4 + find(path.read_text("utf-8"), function).col_offset)
        path.write_text(set_body(path.read_text("utf-8"), function, indent + body), "utf-8")
    for path in out.rglob("*.py"):
        path.write_text(conceal(path.read_text("utf-8"), is_python=True), "utf-8")
    for path in out.rglob("*.md"):
        text = LINK.sub(r"\1", path.read_text("utf-8"))
        path.write_text(conceal(text, is_python=False), "utf-8")


def conceal(text: str, is_python: bool) -> str:
    """Return a file's text without the lines that give a solution away.

    In Python these are lines inside docstrings; the first and the last of a docstring always stay.
    """
    lines = text.split("\n")
    for number in docstring_lines(text) if is_python else range(len(lines)):
        line = lines[number]
        for exercise in EXERCISES:
            if any(squeezed(secret) in squeezed(line) for secret in exercise.secrets):
                indent = line[:len(line) - len(line.lstrip())]
                lines[number] = f"{indent}(left out: exercise {exercise.number})"
    return "\n".join(lines)


def docstring_lines(source: str) -> list[int]:
    """Return the numbers, from 0, of the lines between the first and the last of each docstring."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and ast.get_docstring(node) is not None):
            found += range(node.body[0].lineno, node.body[0].end_lineno - 1)
    return found


def squeezed(text: str) -> str:
    """Return the text without blanks, for a formula may be spaced in any way."""
    return "".join(text.split())


def main() -> None:
    parser = console.parser("Write the student's copy.", __doc__)
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    out = parser.parse_args().out
    handout(out)
    print(f"wrote {out}: {len(EXERCISES)} functions to write, "
          f"see {out / 'course' / 'EXERCISES.md'}")


if __name__ == "__main__":
    console.run(main)
