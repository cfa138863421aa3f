"""Text that every machine with Python has: CPython's documentation and its standard library.

The bundled checkpoint was trained on it. A hash of its name decides whether a topic or module is
held out, the same in every version of Python. Evaluation reads only what is held out; training and
calibration read only the rest.
"""
import hashlib
import pydoc_data.topics
import sysconfig
from pathlib import Path

LEFT_OUT = {  # tests, other people's packages, tables
    "test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data",
    "ensurepip", "encodings", "__pycache__", "turtledemo"}
GENERATED = ("config-", "_sysconfigdata")  # how names begin that are made when Python is built


def held_out(name: str) -> bool:
    """Say whether the topic or module of this name is for evaluation only: one in sixteen is."""
    return hashlib.sha256(name.encode()).digest()[0] < 16


def text(evaluation: bool, characters: int = 500_000) -> str:
    """Join held-out documents, or else training documents, to a text of about `characters`.

    They are evenly spread over all documents of their kind.
    """
    contents = list(documents(evaluation).values())
    step = max(1, sum(map(len, contents)) // characters)
    return "\n".join(contents[::step])


def documents(evaluation: bool) -> dict[str, str]:
    """Read all topics and modules that are held out, or all others. Returns {name: content}.

    The order is always the same.
    """
    contents = {f"topic {name}": topic for name, topic in sorted(pydoc_data.topics.topics.items())}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if LEFT_OUT.intersection(parts) or parts[0].startswith(GENERATED):
            continue
        try:
            module = "module " + ".".join(parts).removesuffix(".py")
            contents[module] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a module that declares another encoding
    return {name: content.strip() + "\n" for name, content in contents.items()
            if held_out(name) == evaluation and content.strip()}
