"""Grade a submission: points for each exercise, and what each failed test expected and what came.

Every function is taken out of the submission and put, alone, into a fresh copy of this project.
There its tests run, so a wrong function costs its own points only, whatever else it does. Students
write everything inside the function: helpers and imports outside it are not taken. Each test that
passes is worth its share of the exercise's points.

    python course/grade.py SUBMISSION
    python course/grade.py SUBMISSION --jobs 4 --json results.json      for a learning platform

This runs the submission's code with your rights. Tests have a time limit, but this is NO SANDBOX:
grade strangers' code in a container, or on a machine that holds nothing of value.
"""
import importlib.util
import json
import re
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a file that is run finds its own folder only

import console
from course import process
from course.exercises import EXERCISES, POINTS, ROOT, SECONDS, Exercise, get_body, set_body
from course.handout import LEFT_OUT

LINES, WIDTH = 5, 200      # at most, of what a failed test says
LARGEST_REPORT = 1_000_000  # bytes; an error message may be of any size
Problems = dict[str, str]   # test -> what went wrong, "" if it passed


# ---- one exercise

def grade(submission: Path, exercise: Exercise, seconds: float) -> Problems:
    """Run an exercise's tests on the submission's function. Returns what went wrong in each."""
    try:
        body = get_body((submission / exercise.file).read_text("utf-8"), exercise.function)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            folder = Path(name) / "project"
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
            path = folder / exercise.file
            path.write_text(set_body(path.read_text("utf-8"), exercise.function, body), "utf-8")
            return run_tests(folder, exercise, seconds)
    except (ValueError, OSError) as error:
        return dict.fromkeys(exercise.tests, str(error))


def run_tests(folder: Path, exercise: Exercise, seconds: float) -> Problems:
    """Run an exercise's tests in a project folder. Returns what went wrong in each.

    ValueError if they do not end within `seconds`, or leave no report. What they print is thrown
    away, and processes that they have started are ended.
    """
    report = folder.parent / "report.xml"  # outside the project, which the tests may delete
    command = [sys.executable, "-m", "pytest", *(f"{exercise.test_file}::{test}"
                                                 for test in exercise.tests),
               f"--junitxml={report}", f"--basetemp={folder.parent / 'tmp'}", "--tb=short",
               "-p", "no:cacheprovider", "-s"]  # -s: nothing printed is kept
    process.run(command, seconds, {"OMP_NUM_THREADS": "1"}, folder)  # --jobs share the cores
    try:
        if report.stat().st_size > LARGEST_REPORT:
            raise ValueError("an error message is too large to be read")
        return read_report(report, exercise)
    except (OSError, ElementTree.ParseError):
        raise ValueError("the tests left no report: the function ended the process or deleted "
                         "its folder") from None


def read_report(report: Path, exercise: Exercise) -> Problems:
    """Read pytest's junit report. Returns what went wrong in each test: its first case that failed.

    The cases of a test stand in order, the smallest first.
    """
    cases = {test: [] for test in exercise.tests}
    elsewhere = "did not run"
    for case in ElementTree.parse(report).iter("testcase"):
        test = case.get("name", "").split("[")[0]
        if test in cases:
            cases[test].append(problem(case, exercise))
        else:  # the test file could not be imported
            elsewhere = problem(case, exercise)
    return {test: next(filter(None, problems), "") if problems else elsewhere
            for test, problems in cases.items()}


def problem(case: ElementTree.Element, exercise: Exercise) -> str:
    """Say in a few lines what went wrong in a case of a test, "" if it passed."""
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            message = found.get("message", kind).removeprefix("AssertionError: ")
            message = re.split(r"\n(?:assert |\[\+)", message)[0]  # what pytest adds to a message
            lines = [line.strip()[:WIDTH] for line in message.splitlines() if line.strip()][:LINES]
            # In pytest's short form: the file, the line's number, "in" the function; then the line.
            here = rf"^{re.escape(exercise.file)}:\d+: in \w+\n +(.*)"
            if at := re.findall(here, found.text or "", re.MULTILINE):
                lines.append(f"at: {at[-1][:WIDTH]}")
            return "\n".join(lines) or kind
    return ""


# ---- all of them

def grade_all(submission: Path, exercises: list[Exercise], seconds: float,
              jobs: int) -> Iterator[tuple[Exercise, int, Problems]]:
    """Grade several exercises at a time. Yields them in order, with their points and problems."""
    def run(exercise: Exercise) -> Problems:
        return grade(submission, exercise, seconds * exercise.seconds / SECONDS)
    with ThreadPoolExecutor(jobs) as pool:
        for exercise, problems in zip(exercises, pool.map(run, exercises), strict=True):
            passed = list(problems.values()).count("")
            yield exercise, POINTS * passed // len(problems), problems


def details(problems: Problems) -> str:
    """Say what went wrong: below each failed test's name, or once if it is the same for all."""
    failed = {test: text for test, text in problems.items() if text}
    if len(set(failed.values())) == 1 and len(failed) > 1:
        failed = {"all tests": next(iter(failed.values()))}
    return "\n".join("\n    ".join([f"  {test}", *text.splitlines()])
                     for test, text in failed.items())


def gradescope(results: list[tuple[Exercise, int, Problems]]) -> dict:
    """Return the results in the form that Gradescope reads, and most platforms can be taught."""
    return {"score": sum(points for _, points, _ in results),
            "tests": [{"number": str(exercise.number), "name": exercise.function,
                       "score": points, "max_score": POINTS,
                       "output": details(problems) or "all tests passed"}
                      for exercise, points, problems in results]}


def parse_args():
    parser = console.parser("Grade a submission.", __doc__)
    parser.add_argument("submission", type=Path, help="the student's folder")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER",
                        help="the exercises to grade (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS,
                        help="time limit for the tests of an ordinary exercise; longer ones get "
                             "more in proportion (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1,
                        help="exercises graded at the same time (default 1)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--at-least", type=int, metavar="POINTS",
                        help="exit with code 1 if the total is below this")
    args = parser.parse_args()
    if not args.submission.is_dir():
        raise ValueError(f"{args.submission}: no such folder; give the student's folder")
    if unknown := set(args.only or []) - {exercise.number for exercise in EXERCISES}:
        raise ValueError(f"--only: there is no exercise {min(unknown)}; "
                         f"they are 1 to {EXERCISES[-1].number}")
    if args.jobs < 1 or args.seconds <= 0:
        raise ValueError("--jobs must be at least 1, and --seconds more than 0")
    if args.json and (args.json.exists() or not args.json.parent.is_dir()):
        raise ValueError(f"--json {args.json}: expected a new file in a folder that exists")
    if importlib.util.find_spec("pytest") is None:
        raise ValueError("the grader needs pytest, which is not installed here: "
                         "python -m pip install -r requirements-dev.txt")
    return args


def main() -> None:
    args = parse_args()
    chosen = [exercise for exercise in EXERCISES if not args.only or exercise.number in args.only]
    print("(this runs the submission's code; it is no sandbox)\n")
    print("| exercise | function | points | tests passed |\n|---|---|---|---|", flush=True)
    results = []
    for exercise, points, problems in grade_all(args.submission, chosen, args.seconds, args.jobs):
        results.append((exercise, points, problems))
        passed = list(problems.values()).count("")
        print(f"| {exercise.number} | {exercise.file} {exercise.function} | {points} / {POINTS} | "
              f"{passed} of {len(problems)} |", flush=True)
    for exercise, points, problems in results:
        if points < POINTS:
            print(f"\n{exercise.number}. {exercise.function}\n{details(problems)}")
    total = sum(points for _, points, _ in results)
    print(f"\ntotal: {total} of {POINTS * len(results)} points")
    if args.json:
        args.json.write_text(json.dumps(gradescope(results), indent=1) + "\n")
    if args.at_least is not None and total < args.at_least:
        sys.exit(1)


if __name__ == "__main__":
    console.run(main)
