"""Documentation that cannot rot, and the rule of who may import whom."""
import ast
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ALLOWED = {
    "model": {"checkpoint"}, "calibrate": {"model", "checkpoint", "text", "console"},
    "prune": {"model", "calibrate", "checkpoint", "console"},
    "flatten": {"model", "calibrate", "prune", "evaluate", "checkpoint", "text", "console", "demo", "beyond"},
    "evaluate": {"model", "calibrate", "checkpoint", "text", "console", "zeroshot"},
    "zeroshot": {"evaluate", "calibrate", "checkpoint", "text", "console"},
    "text": {"checkpoint"}, "checkpoint": set(), "console": set(),
    "beyond": {"model", "calibrate", "prune", "flatten", "evaluate", "checkpoint", "console"},
    "baselines": {"model", "calibrate", "prune", "flatten", "evaluate", "checkpoint", "text", "console", "beyond",
                  "matplotlib"},
}
PACKAGES = {"torch", "safetensors", "sentencepiece", "tiktoken", "numpy"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_go_one_way_and_only_five_packages_are_needed():
    import sys
    for name, allowed in ALLOWED.items():
        for path in [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else (ROOT / name).glob("*.py"):
            found = set(imports(path)) - set(sys.stdlib_module_names) - {name}
            assert found <= allowed | PACKAGES, f"{path} imports {found - allowed - PACKAGES}"


def test_every_function_and_test_in_the_readme_exists():
    rows = re.findall(r"^\| .* \| `([\w.]+)\.(\w+)` \| `(\w+)` \|$", README, re.MULTILINE)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(rows) >= 19
    for module, function, test in rows:
        assert callable(getattr(importlib.import_module(module), function)), function
        assert f"def {test}(" in tests, test


def test_every_file_in_the_readme_exists():
    listing = re.search(r"## Files\n\n```text\n(.*?)```", README, re.DOTALL).group(1)
    names = [line.split()[0] for line in listing.splitlines()]
    assert len(names) >= 10 and all((ROOT / name).exists() for name in names)
    assert all((ROOT / target).exists() for target in re.findall(r"\]\((?!http)([^)]+)\)", README))


def test_ci_runs_the_two_commands_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2 and all(command in script for command in commands)


def test_the_project_holds_no_large_or_pickled_file():
    for path in ROOT.rglob("*"):
        if path.is_file() and not {".git", ".venv", "out"}.intersection(path.relative_to(ROOT).parts):
            assert path.stat().st_size < 15e6 and path.suffix not in (".bin", ".pt", ".pkl"), path
