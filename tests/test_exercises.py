"""The handout is empty where it should be, and the grader gives each function its points."""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from course.exercises import EXERCISES, POINTS, ROOT, get_body, set_body
from course.grade import grade
from course.grade import main as grade_main
from course.handout import FOR_TEACHERS, LEFT_OUT, STAND_INS, handout, squeezed


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
    """No body, no expression that gives one away, and no answer; but all other tests."""
    assert not (student / ".git").exists() and (student / "course" / "EXERCISES.md").exists()
    assert not any((student / path).exists() for path in FOR_TEACHERS)
    assert all((ROOT / path).exists() for path in FOR_TEACHERS)
    everything = "\n".join(path.read_text() for path in student.rglob("*.py"))
    for exercise in EXERCISES:
        assert body_of(ROOT, exercise) not in everything
        empty = f'raise NotImplementedError("exercise {exercise.number}")'
        left = STAND_INS.get((exercise.file, exercise.function), empty)
        assert body_of(student, exercise).strip() == left
    for path in (ROOT / "tests").glob("*.py"):
        name = path.relative_to(ROOT)
        assert str(name) in FOR_TEACHERS or (student / name).read_bytes() == path.read_bytes()


def test_commands_of_one_process_run_before_the_last_exercise_is_done(student):
    """All of them pass through `whole`, which is exercise 20."""
    code = "import torch, parallel; assert parallel.whole(torch.tensor([3, 4])).tolist() == [3, 4]"
    assert subprocess.run([sys.executable, "-c", code], cwd=student).returncode == 0


def test_every_link_in_the_handout_leads_somewhere(student):
    assert "](docs/teaching.md" in (ROOT / "README.md").read_text()
    for path in student.rglob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def texts_of(folder):
    """Return the texts of a copy of the project, without blanks, under their paths in it."""
    paths = [path for kind in ("*.py", "*.md", "*.svg", "*.ipynb", "*.toml")
             for path in folder.rglob(kind)]
    return {path.relative_to(folder): squeezed(path.read_text()) for path in paths
            if not LEFT_OUT.intersection(path.relative_to(folder).parts)}


def test_no_expression_that_gives_a_solution_away_is_left_in_the_handout(student):
    """Each is in the project, at least one of an exercise in its solution, and none in the copy."""
    project, copy = texts_of(ROOT), texts_of(student)
    for exercise in EXERCISES:
        solution = squeezed(body_of(ROOT, exercise))
        assert any(squeezed(secret) in solution for secret in exercise.secrets)
        for secret in map(squeezed, exercise.secrets):
            assert any(secret in text for path, text in project.items()
                       if path.name != "exercises.py"), secret
            assert not [path for path, text in copy.items() if secret in text], secret
    leverage = (student / "prune.py").read_text()
    assert "(left out: exercise 11)" in leverage and "(left out: exercise 12)" in leverage


HOSTILE = {  # function: (its points, words of the remark, its body); ORIGINAL is the right body
    "select_groups": (0, "not valid Python", None),
    "query_heads_of": (0, "expected: int64 (2,) [0, 3]\n    came:     int64 (2,) [0, 0]", """
    from pathlib import Path
    for path in [Path("evaluate.py"), Path("prune.py"), *Path("tests").glob("*.py")]:
        path.write_text("raise SystemExit")
    return torch.arange(n_rep).repeat(len(kv_heads))"""),
    "head_importance": (10, "", """
    import subprocess
    for _ in range(200):
        print("x" * 100_000)
    with open(PIDS, "a") as file:
        file.write(str(subprocess.Popen(["sleep", "1000"]).pid) + " ")
    ORIGINAL"""),
    "prune_attention": (0, "too large", """
    raise ValueError("y" * 2_000_000)"""),
    "ridge_leverage": (0, "stopped after 10 s", """
    while True:
        pass"""),
    "nystrom_down": (3, "at: return W[:, kept].double()", """
    if len(keep) == W.shape[1]:
        return W.double()
    return W[:, kept].double()"""),
    "window_losses": (0, "left no report", """
    import os
    import shutil
    shutil.rmtree(os.getcwd())
    os._exit(0)"""),
}


def test_whatever_a_function_does_it_loses_only_its_own_points(tmp_path, cli, monkeypatch):
    """It edits other files, hangs, starts processes, prints megabytes, or deletes the folder."""
    patient = [replace(exercise, seconds=10 if exercise.function == "ridge_leverage" else 300)
               for exercise in EXERCISES]
    monkeypatch.setattr("course.grade.EXERCISES", patient)
    submission, pids = tmp_path / "submission", tmp_path / "pids"
    submission.mkdir()
    exercises = {exercise.function: exercise for exercise in EXERCISES}
    for function, (_, _, body) in HOSTILE.items():
        exercise = exercises[function]
        path = submission / exercise.file
        if not path.exists():
            shutil.copy(ROOT / exercise.file, path)
        if body is None:
            path.write_text(f"def {function}(:")
        else:
            body = body.replace("    ORIGINAL", body_of(ROOT, exercise)).replace(
                "PIDS", repr(str(pids)))
            change_body(path, function, body)
    numbers = {exercises[function].number: points for function, (points, *_) in HOSTILE.items()}
    code, out, _ = cli(grade_main, submission, "--only", *numbers, "--jobs", 2, "--at-least", 14,
                       "--json", tmp_path / "results.json")
    assert code == 1 and "no sandbox" in out and "total: 13 of 70 points" in out, out
    rows = re.findall(r"^\| (\d+) \| .* \| (\d+) / 10", out, re.MULTILINE)
    assert {int(number): int(points) for number, points in rows} == numbers, out
    for _, words, _ in HOSTILE.values():
        assert words in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["score"] == 13 and len(out) < 10_000
    for test in results["tests"]:
        points, words, _ = HOSTILE[test["name"]]
        assert test["score"] == points and test["max_score"] == 10 and words in test["output"]
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.parametrize("options, words", [
    (["--only", 99], "no exercise 99"), (["--jobs", 0], "--jobs"), ([], "the grader needs pytest")])
def test_what_the_grader_cannot_do_is_one_line(tmp_path, cli, monkeypatch, options, words):
    monkeypatch.setitem(sys.modules, "pytest", None)  # as if it were not installed
    code, out, err = cli(grade_main, tmp_path, *options)
    assert code == 2 and words in err and err.count("\n") == 1 and not out


def test_a_body_that_does_not_fit_is_named_before_any_test_runs(tmp_path):
    exercise = next(exercise for exercise in EXERCISES if exercise.function == "query_heads_of")
    for source, words in (("def query_heads_of(a, b):\n  return a\n", "indent it by four spaces"),
                          ("def query_heads_of(a, b): return a\n", "on lines of its own"),
                          ("x = 1\n", "no query_heads_of")):
        (tmp_path / "prune.py").write_text(source)
        problem, = grade(tmp_path, exercise, seconds=0).values()
        assert words in problem


def test_the_handout_overwrites_nothing(tmp_path):
    for out in (tmp_path, ROOT / "copy"):
        with pytest.raises(ValueError, match=r"exists|inside"):
            handout(out)


def section_of(document, exercise):
    """Return the section of EXERCISES.md or ANSWERS.md about an exercise."""
    text = (ROOT / "course" / document).read_text()
    section, = re.findall(rf"^## {exercise.number}\. .*?(?=^## |\Z)", text,
                          re.MULTILINE | re.DOTALL)
    return section


def test_the_text_names_every_exercise_its_function_and_its_tests():
    for exercise in EXERCISES:
        section = section_of("EXERCISES.md", exercise)
        assert f"`{exercise.function}`" in section and exercise.file in section
        assert all(test in section for test in exercise.tests)
        assert "**Question.**" in section and "Answer" not in section
        assert "**Success.**" in section and re.search(r"\*\*\d+\sminutes\*\*,\sneeds\s", section)


def test_the_plan_of_a_week_adds_up():
    minutes = [int(re.search(r"\*\*(\d+)\sminutes", section_of("EXERCISES.md", exercise))[1])
               for exercise in EXERCISES]
    plan = re.findall(r"exercises (\d+) to (\d+):.* \| (\d+) \| (\d+) \|$",
                      (ROOT / "docs" / "teaching.md").read_text(), re.MULTILINE)
    left = 0
    for first, last, time, points in (map(int, row) for row in plan):
        assert first == left + 1 and points == POINTS * (last - left)
        assert time == sum(minutes[left:last])
        left = last
    assert left == len(EXERCISES)


def test_what_the_walkthrough_prints_as_success_stands_in_it():
    walkthrough = (ROOT / "course" / "WALKTHROUGH.md").read_text()
    promises = [success for exercise in EXERCISES if "course.walkthrough" in (
        success := section_of("EXERCISES.md", exercise).split("**Success.**")[1])]
    numbers = set(re.findall(r"\d+\.\d+", "".join(promises)))
    assert len(promises) >= 6 and numbers <= set(re.findall(r"\d+\.\d+", walkthrough)), numbers


def test_the_answers_are_apart_with_what_wrong_ones_reveal():
    for exercise in EXERCISES:
        section = section_of("ANSWERS.md", exercise)
        heading = section_of("EXERCISES.md", exercise).split("\n")[0]
        assert section.split("\n")[0] == heading
        assert "**Answer.**" in section and "**Often wrong.**" in section


def block_of_teaching(start):
    """Return a block of code of docs/teaching.md that has this line in it."""
    blocks = re.findall(r"```\w+\n(.*?)```", (ROOT / "docs" / "teaching.md").read_text(), re.DOTALL)
    block, = [block for block in blocks if start in block]
    return block


def test_the_examples_for_learning_platforms_run_as_far_as_they_go(tmp_path):
    """Gradescope's script, and the workflow's last command, each in folders as there."""
    folder = tmp_path / "autograder"
    for name in ("source", "submission", "results"):
        (folder / name).mkdir(parents=True)
    (folder / "source" / "flattengpt").symlink_to(ROOT)
    (folder / "submission" / "prune.py").write_text(
        "def query_heads_of(kv_heads, n_rep):\n" +
        get_body((ROOT / "prune.py").read_text(), "query_heads_of"))
    script = tmp_path / "run_autograder"
    script.write_text(block_of_teaching("results.json"))
    python = Path(sys.executable).parent
    environment = os.environ | {"AUTOGRADER": str(folder), "PATH": f"{python}:{os.environ['PATH']}"}
    subprocess.run(["bash", script], env=environment, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((folder / "results" / "results.json").read_text())
    assert results["score"] == 10 and len(results["tests"]) == len(EXERCISES)
    assert results.keys() <= {"score", "tests"}  # names that Gradescope knows, here and in tests
    assert {"number", "name", "score", "max_score", "output"} == set().union(*results["tests"])

    workflow = block_of_teaching("runs-on")
    command, place = re.search(r"run: (python .*)\n +working-directory: (\w+)", workflow).groups()
    shutil.copytree(ROOT, tmp_path / place, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (tmp_path / "submission").mkdir()
    done = subprocess.run(command, shell=True, cwd=tmp_path / place, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 1 and f"total: 0 of {10 * len(EXERCISES)} points" in done.stdout
