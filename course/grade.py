"""Grade a submission: a table of points for each exercise.

Every function is taken out of the submission and put, alone, into a copy of this project. There its
tests run, so a wrong function costs its own points only. Students write everything inside the
function: helpers and imports outside it are not taken.

    python course/grade.py SUBMISSION

This runs the submission's code with your rights. Tests have a time limit, but this is NO SANDBOX:
grade strangers' code in a container, or on a machine that holds nothing of value.
"""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a file that is run finds its own folder only

import console
from course.exercises import EXERCISES, POINTS, ROOT, Exercise, get_body, set_body
from course.handout import LEFT_OUT


def run_tests(folder: Path, exercise: Exercise, seconds: float) -> tuple[int, int, str]:
    """Run an exercise's tests in a project folder, and end them after `seconds`.

    Returns how many passed, how many there are, and a remark.
    """
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    names = [f"{exercise.test_file}::{test}" for test in exercise.tests]
    command = [sys.executable, "-m", "pytest", *names, f"--junitxml={report}",
               "-p", "no:cacheprovider"]
    process = subprocess.Popen(command, cwd=folder, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 0, len(names), f"stopped after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # the tests and whatever they have started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not report.exists():
        return 0, len(names), "the tests did not finish"
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases
              if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    remark = ""
    if failed:
        remark = f"{failed[0].get('name', '')} failed"
    elif skipped:
        remark = "skipped: a package is missing"
    return len(cases) - len(failed) - len(skipped), max(1, len(cases)), remark


def grade(submission: Path, exercises: list[Exercise], seconds: float) -> list[int]:
    """Print a row for each exercise. Returns their points.

    Points are all or nothing: a function that is half right is wrong.
    """
    all_points = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "project"
        shutil.copytree(ROOT, folder, ignore=lambda _, names: LEFT_OUT.intersection(names))
        for exercise in exercises:
            reference = (ROOT / exercise.file).read_text()
            try:
                body = get_body((submission / exercise.file).read_text(), exercise.function)
                (folder / exercise.file).write_text(set_body(reference, exercise.function, body))
                passed, total, remark = run_tests(folder, exercise, seconds)
            except (ValueError, OSError) as error:
                passed, total, remark = 0, 1, str(error)
            (folder / exercise.file).write_text(reference)
            points = POINTS if passed == total else 0
            all_points.append(points)
            print(f"| {exercise.number} | {exercise.file} {exercise.function} | "
                  f"{points} / {POINTS} | {remark} |", flush=True)
    return all_points


def main() -> None:
    parser = console.parser("Grade a submission.", __doc__)
    parser.add_argument("submission", type=Path, help="the student's folder")
    parser.add_argument("--only", type=int, nargs="+",
                        help="numbers of the exercises to grade (default: all)")
    parser.add_argument("--seconds", type=float, default=60,
                        help="time limit for the tests of an exercise (default 60)")
    args = parser.parse_args()
    if not args.submission.is_dir():
        raise ValueError(f"{args.submission}: no such folder; give the student's folder")
    print("(this runs the submission's code; it is no sandbox)\n")
    print("| exercise | function | points | remark |\n|---|---|---|---|", flush=True)
    chosen = [exercise for exercise in EXERCISES if not args.only or exercise.number in args.only]
    points = grade(args.submission, chosen, args.seconds)
    print(f"total: {sum(points)} of {POINTS * len(points)} points")


if __name__ == "__main__":
    console.run(main)
