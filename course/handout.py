"""Write the student's copy of the project: exercised functions empty, the rest intact, no history.

    python course/handout.py OUT
"""
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a file that is run finds its own folder only

import console
from course.exercises import EXERCISES, ROOT, set_body

LEFT_OUT = {".git", ".venv", "out", "__pycache__", ".pytest_cache", ".ruff_cache"}


def handout(out: Path) -> None:
    """Write the copy into `out`. ValueError if `out` exists or lies inside the project."""
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder")
    if ROOT.resolve() in out.resolve().parents:
        raise ValueError(f"{out} is inside the project; choose a folder outside it")
    shutil.copytree(ROOT, out, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for exercise in EXERCISES:
        path = out / exercise.file
        empty = f'    raise NotImplementedError("exercise {exercise.number}")'
        path.write_text(set_body(path.read_text(), exercise.function, empty))


def main() -> None:
    parser = console.parser("Write the student's copy.", __doc__)
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    out = parser.parse_args().out
    handout(out)
    print(f"wrote {out}: {len(EXERCISES)} functions to write, "
          f"see {out / 'course' / 'EXERCISES.md'}")


if __name__ == "__main__":
    console.run(main)
