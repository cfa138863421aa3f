"""Text that every machine with Python has: CPython's own documentation and the sources of its standard library.

The bundled checkpoint was trained on it. A topic or module is held out, in every version of Python, if a hash of its
name says so: evaluation reads only those, training and calibration only the others.
"""
import hashlib
import pydoc_data.topics
import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "ensurepip",
            "encodings", "__pycache__", "turtledemo"}  # tests, other people's packages, tables


def held_out(name: str) -> bool:
    """Whether the topic or module of this name is for evaluation only: one in sixteen."""
    return hashlib.sha256(name.encode()).digest()[0] < 16


def text(evaluation: bool, characters: int = 500_000) -> str:
    """The held-out documents, or else training documents, one after the other; so many characters of evenly spread ones."""
    found = list(documents(evaluation).values())
    share = max(1, sum(map(len, found)) // characters)
    return "\n".join(found[::share])


def documents(evaluation: bool) -> dict[str, str]:
    """{name: text} of all topics and modules that are held out, or of all that are not, in a fixed order."""
    texts = {f"topic {name}": text for name, text in sorted(pydoc_data.topics.topics.items())}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if not LEFT_OUT.intersection(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            try:
                texts["module " + ".".join(parts).removesuffix(".py")] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a module that declares another encoding
    return {name: text.strip() + "\n" for name, text in texts.items() if held_out(name) == evaluation and text.strip()}
