"""The handout is empty where it should be, and the grader gives each function the points it earns."""
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
    out = tmp_path_factory.mktemp("course") / "student"
    handout(out)
    return out


def run_graded_tests(folder):
    names = [f"{exercise.test_file}::{test}" for exercise in EXERCISES for test in exercise.tests]
    done = subprocess.run([sys.executable, "-m", "pytest", *names, "-p", "no:cacheprovider", "-rA", "--tb=no"], cwd=folder,
                          capture_output=True, text=True)
    return done.stdout


def test_every_graded_test_fails_on_the_fresh_handout(student):
    out = run_graded_tests(student)
    assert "PASSED" not in out and re.search(r"^\d+ failed in", out, re.MULTILINE), out[-2000:]


def test_every_graded_test_passes_when_the_bodies_are_put_back(student, tmp_path):
    solved = tmp_path / "solved"
    shutil.copytree(student, solved)
    for exercise in EXERCISES:
        body = get_body((ROOT / exercise.file).read_text(), exercise.function)
        (solved / exercise.file).write_text(set_body((solved / exercise.file).read_text(), exercise.function, body))
    out = run_graded_tests(solved)
    assert "FAILED" not in out and re.search(r"^\d+ passed in", out, re.MULTILINE), out[-2000:]


def test_the_handout_holds_no_solution_and_no_history(student):
    assert not (student / ".git").exists() and (student / "course" / "EXERCISES.md").exists()
    everything = "\n".join(path.read_text() for path in student.rglob("*.py"))
    for exercise in EXERCISES:
        body = get_body((ROOT / exercise.file).read_text(), exercise.function)
        assert body not in everything
        assert get_body((student / exercise.file).read_text(), exercise.function) == \
            f'    raise NotImplementedError("exercise {exercise.number}")'
    for path in (ROOT / "tests").glob("*.py"):
        assert (student / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_wrong_and_endless_functions_lose_only_their_own_points(student, tmp_path, cli):
    by_function = {exercise.function: exercise for exercise in EXERCISES}
    submission = tmp_path / "submission"
    submission.mkdir()
    wrong = {"query_heads_of": "    return torch.arange(n_rep).repeat(len(kv_heads))",
             "ridge_leverage": "    while True:\n        pass"}
    source = (ROOT / "prune.py").read_text()
    for function, body in wrong.items():
        source = set_body(source, function, body)
    (submission / "prune.py").write_text(source)
    (submission / "flatten.py").write_text("def select_groups(:")
    numbers = [by_function[name].number for name in ("query_heads_of", "ridge_leverage", "head_importance", "select_groups")]
    code, out, _ = cli(grade_main, submission, "--only", *numbers, "--seconds", 15)
    assert code == 0 and "no sandbox" in out
    points = {int(row[0]): int(row[1]) for row in re.findall(r"^\| (\d+) \| .* \| (\d+) / 10", out, re.MULTILINE)}
    assert points == {numbers[0]: 0, numbers[1]: 0, numbers[2]: 10, numbers[3]: 0}
    assert "stopped after 15 s" in out and "not valid Python" in out and "total: 10 of 40 points" in out


def test_the_handout_overwrites_nothing(tmp_path):
    for out in (tmp_path, ROOT / "copy"):
        with pytest.raises(ValueError, match=r"exists|inside"):
            handout(out)


def test_the_text_names_every_exercise_its_function_and_its_tests():
    text = (ROOT / "course" / "EXERCISES.md").read_text()
    for exercise in EXERCISES:
        section = re.search(rf"^## {exercise.number}\. .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group(0)
        assert f"`{exercise.function}`" in section and exercise.file in section
        assert all(test in section for test in exercise.tests)
        assert "**Question.**" in section and "**Answer" in section and "minutes" in section
