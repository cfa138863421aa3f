"""Documents that cannot rot, and the rule of who may import whom."""
import ast
import graphlib
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / "compare" / "results" / "README.md", ROOT / "demo" / "README.md",
          *sorted((ROOT / "course").glob("*.md"))]
LECTURES = sorted((ROOT / "docs" / "lectures").glob("*.md"))
LEVELS = [{"parallel"}, {"checkpoint"}, {"console", "text"}, {"model"},
          {"calibrate", "prune", "evaluate"}, {"flatten"}, {"beyond"}, {"compare"}, {"demo"},
          {"course"}, {"docs"}]  # each imports from lower ones
PACKAGES = {"torch", "safetensors", "sentencepiece", "tiktoken", "numpy"}
OPTIONAL = {"gguf", "matplotlib", "transformers"}  # a user may lack them
ELSEWHERE = {"pip", "pytest", "convert_hf_to_gguf"}  # commands of other projects


def sources() -> dict[str, Path]:
    """{"flatten": its path, "console.options": its path, ...} of all code but the tests."""
    paths = [*ROOT.glob("*.py"), *(path for folder in set().union(*LEVELS)
                                   for path in (ROOT / folder).rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(path: Path, modules: set[str]) -> set[str]:
    """What a file imports: modules of this project under their full names, packages of others."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= inner or {node.module}
    return found


def test_every_file_and_folder_imports_from_lower_levels_only():
    """So the five files know nothing of beyond, compare, course and demo."""
    modules = sources()
    units = set().union(*LEVELS)
    assert {name.split(".")[0] for name in modules} == units
    for name, path in modules.items():
        unit = name.split(".")[0]
        level = next(k for k, same in enumerate(LEVELS) if unit in same)
        lower = set().union(*LEVELS[:level])
        known = sys.stdlib_module_names | PACKAGES | OPTIONAL | {unit} | lower
        wrong = {other for other in imports(path, modules.keys())
                 if other.split(".")[0] not in known}
        assert not wrong, f"{path} imports {wrong}"


def test_no_file_imports_itself_through_others():
    modules = sources()
    graph = {name: imports(path, modules.keys()) & modules.keys() - {name}
             for name, path in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_imports_inside_functions_are_of_optional_packages():
    for path in sources().values():
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    names = ([node.module] if isinstance(node, ast.ImportFrom) else
                             [alias.name for alias in node.names] if isinstance(node, ast.Import)
                             else [])
                    wrong = {name for name in names if name.split(".")[0] not in OPTIONAL}
                    assert not wrong, f"{path} line {node.lineno} imports {wrong}"


def test_only_optional_packages_are_missing_from_the_requirements():
    required = {re.split("[<>=]", line)[0]
                for line in (ROOT / "requirements.txt").read_text().split()}
    assert required == PACKAGES


def test_every_function_and_test_in_the_documents_exists():
    pattern = r"^\| .* \| `([\w.]+)\.(\w+)` \| `(\w+)` \|$"
    rows = [row for path in DOCUMENTS
            for row in re.findall(pattern, path.read_text(), re.MULTILINE)]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(rows) >= 19
    for module, function, test in rows:
        assert callable(getattr(importlib.import_module(module), function)), function
        assert f"def {test}(" in tests, test


def test_every_file_in_the_readme_exists():
    listing = re.search(r"## Files\n\n```text\n(.*?)```", README.read_text(), re.DOTALL)[1]
    names = [line.split()[0] for line in listing.splitlines()]
    assert all((ROOT / name).exists() for name in names)
    code = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*.py")}
    assert {name.rstrip("/") for name in names} >= {*code, *set().union(*LEVELS[:3]), "tests"}


def anchors(path: Path) -> set[str]:
    """The names under which a document's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS + OTHERS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    text = re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("path", DOCUMENTS + OTHERS, ids=lambda path: path.name)
def test_every_command_names_a_script_and_options_that_exist(path):
    text = " ".join(path.read_text().replace("\\\n", " ").split())
    code = "".join(source.read_text() for source in sources().values())
    for script, rest in re.findall(r"\bpython (-m [\w.]+|[\w/]+\.py)([^`#|;&]*)", text):
        name = script.removeprefix("-m ").removesuffix(".py").replace("/", ".")
        if name in ELSEWHERE:
            continue
        assert {name, f"{name}.__main__"} & sources().keys(), script
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest.partition("torchrun")[0]):
            assert re.search(f'"(--)?{option[2:]}"', code), f"{script} {option}"


def test_the_readme_is_a_front_page():
    """At most 190 lines. Lines of at most 100 characters, but for tables and what is printed."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 190
    for path in DOCUMENTS:
        text = re.sub(r"<!-- output of.*?```text.*?```", "", path.read_text(), flags=re.DOTALL)
        for line in text.splitlines():
            free = line.startswith(("|", "python3 -m venv"))
            assert free or len(line) <= 100, f"{path.name}: {line}"


def test_ci_runs_the_two_commands_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", README.read_text(), re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2 and all(command in script for command in commands)


def test_the_project_holds_no_large_or_pickled_file():
    for path in ROOT.rglob("*"):
        if path.is_file() and not {".git", ".venv", "out"} & set(path.relative_to(ROOT).parts):
            assert path.stat().st_size < 15e6, path
            assert path.suffix not in (".bin", ".pt", ".pkl"), path


@pytest.mark.parametrize("path", LECTURES, ids=lambda path: path.name)
def test_a_lecture_is_ten_to_fifteen_pages_with_something_to_see_and_notes(path):
    title, *pages = path.read_text().split("\n---\n")
    assert title.startswith("# ") and 10 <= len(pages) <= 15
    for number, page in enumerate(pages, 1):
        shown = page.partition("\n> ")[0]
        assert f"\n## {number}. " in page and "\n> " in page, page
        assert re.search(r"^(!\[|```|\|)", shown, re.MULTILINE) and len(shown.split()) < 120, page


@pytest.mark.parametrize("path", LECTURES, ids=lambda path: path.name)
def test_the_numbers_of_a_lecture_stand_where_they_were_measured(path):
    """So the ones with decimals do, in results, in beyond or in what the walkthrough prints."""
    sources = "".join((ROOT / name).read_text() for name in (
        "docs/results.md", "docs/beyond.md", "course/WALKTHROUGH.md"))
    measured = set(re.findall(r"\d+\.\d+", sources))
    quoted = set(re.findall(r"\d+\.\d+", path.read_text()))
    assert len(quoted) > 10 and quoted <= measured, quoted - measured
