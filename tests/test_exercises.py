"""The handout is empty where it should be, and the grader gives each function its points."""
import re
import shutil
import subprocess
import sys

import pytest

from course.exercises import EXERCISES, ROOT, get_body, set_body
from course.grade import main as grade_main
from course.handout import handout


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A fresh handout."""
    out = tmp_path_factory.mktemp("course") / "student"
    handout(out)
    return out


def body_of(folder, exercise):
    return get_body((folder / exercise.file).read_text(), exercise.function)


def change_body(path, function, body):
    path.write_text(set_body(path.read_text(), function, body))


def run_graded_tests(folder):
    """Return what pytest prints about the graded tests in a copy of the project."""
    names = [f"{exercise.test_file}::{test}" for exercise in EXERCISES for test in exercise.tests]
    command = [sys.executable, "-m", "pytest", *names, "-p", "no:cacheprovider", "-rA", "--tb=no"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_every_graded_test_fails_on_the_fresh_handout(student):
    out = run_graded_tests(student)
    assert "PASSED" not in out and re.search(r"^\d+ failed in", out, re.MULTILINE), out[-2000:]


def test_every_graded_test_passes_when_the_bodies_are_put_back(student, tmp_path):
    solved = tmp_path / "solved"
    shutil.copytree(student, solved)
    for exercise in EXERCISES:
        change_body(solved / exercise.file, exercise.function, body_of(ROOT, exercise))
    out = run_graded_tests(solved)
    assert "FAILED" not in out and re.search(r"^\d+ passed in", out, re.MULTILINE), out[-2000:]


def test_the_handout_holds_no_solution_and_no_history(student):
    assert not (student / ".git").exists() and (student / "course" / "EXERCISES.md").exists()
    everything = "\n".join(path.read_text() for path in student.rglob("*.py"))
    for exercise in EXERCISES:
        assert body_of(ROOT, exercise) not in everything
        empty = f'    raise NotImplementedError("exercise {exercise.number}")'
        assert body_of(student, exercise) == empty
    for path in (ROOT / "tests").glob("*.py"):
        assert (student / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_wrong_and_endless_functions_lose_only_their_own_points(tmp_path, cli):
    """One is wrong, one never ends, one is right, and one is in a file that is no Python."""
    submission = tmp_path / "submission"
    submission.mkdir()
    shutil.copy(ROOT / "prune.py", submission)
    change_body(submission / "prune.py", "query_heads_of",
                "    return torch.arange(n_rep).repeat(len(kv_heads))")
    change_body(submission / "prune.py", "ridge_leverage", "    while True:\n        pass")
    (submission / "flatten.py").write_text("def select_groups(:")
    expected = {"query_heads_of": 0, "ridge_leverage": 0, "head_importance": 10, "select_groups": 0}
    number_of = {exercise.function: exercise.number for exercise in EXERCISES}
    numbers = [number_of[function] for function in expected]
    code, out, _ = cli(grade_main, submission, "--only", *numbers, "--seconds", 15)
    assert code == 0 and "no sandbox" in out and "total: 10 of 40 points" in out
    assert "stopped after 15 s" in out and "not valid Python" in out
    rows = re.findall(r"^\| (\d+) \| .* \| (\d+) / 10", out, re.MULTILINE)
    points = {int(number): int(points) for number, points in rows}
    assert points == dict(zip(numbers, expected.values(), strict=True))


def test_the_handout_overwrites_nothing(tmp_path):
    for out in (tmp_path, ROOT / "copy"):
        with pytest.raises(ValueError, match=r"exists|inside"):
            handout(out)


def test_the_text_names_every_exercise_its_function_and_its_tests():
    text = (ROOT / "course" / "EXERCISES.md").read_text()
    for exercise in EXERCISES:
        section, = re.findall(rf"^## {exercise.number}\. .*?(?=^## |\Z)", text,
                              re.MULTILINE | re.DOTALL)
        assert f"`{exercise.function}`" in section and exercise.file in section
        assert all(test in section for test in exercise.tests)
        assert "**Question.**" in section and "**Answer" in section and "minutes" in section
