"""WikiText-2 and other text: found, or fetched once, and joined exactly as the field joins it."""
import contextlib
import hashlib
import lzma
import os
import re
import secrets
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from text import stdlib

# The official archive, in a copy pinned to one commit (its first home is gone). Text: CC BY-SA 3.0.
URL = ("https://huggingface.co/datasets/ggml-org/ci/resolve/"
       "927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip")
ZIP_NAME, ZIP_BYTES = "wikitext-2-raw-v1.zip", 4_721_645
ZIP_SHA256 = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"
TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
MOST_TEXT_BYTES = 2**30
PYTHON = "python"  # --data python: the text that the bundled checkpoint was trained on
SELF = "self"      # --data self: text that the model writes itself, see calibrate.written
HELD_OUT = 0.1  # share of a plain text file, at its end, that calibration never sees


# ---- which text: each function returns it, and its name

def calibration_text(data: str | None, python: int = 500_000) -> tuple[str, str]:
    """Read a text to calibrate on: WikiText-2's training split, or else its validation split.

    Of another file it is the first nine tenths. `data` is a folder, a .raw or .txt file, the
    official zip, "python" for about `python` characters of Python's library, or None for the zip in
    the cache, downloaded first if need be. ValueError for the test split: a model tuned on it
    proves nothing.
    """
    if data == PYTHON:
        return stdlib.text(evaluation=False, characters=python), "Python's library"
    path = find(data)
    if path.is_dir() or zipfile.is_zipfile(path):
        for split, name in (("train", "train"), ("valid", "validation")):
            if (raw := read_split(path, split)) is not None:
                return join_rows(raw), f"WikiText-2 {name}"
        raise ValueError(f"{path} holds neither wiki.train.raw nor wiki.valid.raw to calibrate on")
    raw = read(path)
    if hashlib.sha256(raw).hexdigest() == TEST_SHA256:
        raise ValueError(f"{path} is WikiText-2's test split, which calibration must not see; "
                         "give the folder with wiki.train.raw or wiki.valid.raw")
    text = plain_text(path, raw)
    return text[:cut(text)], f"{path.name}, first {1 - HELD_OUT:.0%}"


def held_out_text(texts: list[str] | None) -> tuple[str, str]:
    """Read a text to judge a compressed model on: WikiText-2's test split.

    Of another file it is the last tenth. Of several calibration texts the first decides that is not
    the model's own. ValueError if all are.
    """
    data = next((text for text in texts or [None] if text != SELF), SELF)
    if data == SELF:
        raise ValueError("--data self: text that a model writes itself cannot judge it; name "
                         "another text, too")
    path = find(data) if data != PYTHON else None
    if path is None or path.is_dir() or zipfile.is_zipfile(path):
        return evaluation_text(data)
    text = plain_text(path, read(path))
    return text[cut(text):], f"{path.name}, last {HELD_OUT:.0%}"


def evaluation_text(data: str | None) -> tuple[str, str]:
    """Read a text to evaluate on: WikiText-2's test split from a folder or zip, or a whole file."""
    if data == PYTHON:
        return stdlib.text(evaluation=True), "Python's library, held-out modules"
    path = find(data)
    if path.is_dir() or zipfile.is_zipfile(path):
        if (raw := read_split(path, "test")) is None:
            raise ValueError(f"{path} holds no wiki.test.raw")
        return join_rows(raw), "WikiText-2 test"
    raw = read(path)
    is_test = hashlib.sha256(raw).hexdigest() == TEST_SHA256
    return plain_text(path, raw), "WikiText-2 test" if is_test else path.name


def cut(text: str) -> int:
    """Find where the held-out end of a text begins: at a line break, if there is one."""
    start = int(len(text) * (1 - HELD_OUT))
    return text.find("\n", start) + 1 or start


# ---- from bytes to text

def join_rows(raw: bytes) -> str:
    r"""Join WikiText's lines as the field's code joins its rows, with "\n\n" between them.

    A row keeps its "\n" at the end. A blank row is "".
    """
    rows = decode(raw).split("\n")
    rows = [row + "\n" for row in rows[:-1]] + rows[-1:]
    rows = rows if rows[-1] else rows[:-1]
    return "\n\n".join(row if row.strip() else "" for row in rows)


def plain_text(path: Path, raw: bytes) -> str:
    """Decode a text file. WikiText, known by its name (.raw) or how it begins, is joined by row."""
    is_wikitext = path.suffix == ".raw" or re.match(rb"\s*\n = [^\n]* = \n", raw[:1000])
    return join_rows(raw) if is_wikitext else decode(raw)


def decode(raw: bytes) -> str:
    """Decode UTF-8, with line ends as \\n."""
    return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


# ---- from files to bytes

def read(path: Path) -> bytes:
    """Read the bytes of a UTF-8 file. ValueError if it is empty, too large or not UTF-8."""
    if path.stat().st_size > MOST_TEXT_BYTES:
        raise ValueError(f"{path} is larger than {MOST_TEXT_BYTES >> 30} GB; give a part of it")
    return checked(path.read_bytes(), path)


def checked(raw: bytes, path: Path) -> bytes:
    """Return the bytes if they are text. ValueError if they are blank or not UTF-8."""
    try:
        blank = not raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path} is not UTF-8 text ({where})") from None
    if blank:
        raise ValueError(f"{path} holds no text")
    return raw


def read_split(path: Path, split: str) -> bytes | None:
    """Read wiki.<split>.raw or .txt from a folder or a zip. None if it is not there.

    It may lie in a folder wikitext-2-raw inside, or in the zip inside the folder.
    """
    names = [f"{folder}wiki.{split}.{end}" for folder in ("", "wikitext-2-raw/")
             for end in ("raw", "txt")]
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return read(path / name)
        return read_split(path / ZIP_NAME, split) if (path / ZIP_NAME).is_file() else None
    try:
        with zipfile.ZipFile(path) as archive:
            present = set(archive.namelist())
            for info in (archive.getinfo(name) for name in names if name in present):
                if info.file_size > MOST_TEXT_BYTES:
                    raise ValueError(f"{path}: {info.filename} unpacks to more than "
                                     f"{MOST_TEXT_BYTES >> 30} GB")
                return checked(archive.read(info), path / info.filename)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError,
            OSError) as error:
        raise ValueError(f"{path} is a damaged zip file ({error}); download it again") from None
    return None


def find(data: str | None) -> Path:
    """Find the folder, file or zip to read. Without `data` it is the zip in the cache.

    That is downloaded if it is not there yet.
    """
    if data is not None:
        if not (Path(data).is_file() or Path(data).is_dir()):  # a device or a pipe may never end
            raise ValueError(f"{data}: no such file or folder; expected a folder with "
                             f"wiki.*.raw, a text file, or {ZIP_NAME}")
        return Path(data)
    path = cache_folder() / ZIP_NAME
    if not path.is_file():
        url = os.environ.get("FLATTENGPT_WIKITEXT_URL", URL)
        try:
            download(url, path, ZIP_BYTES, ZIP_SHA256)
        except OSError as error:
            raise ValueError(f"WikiText-2 could not be downloaded ({error}); put {ZIP_NAME} "
                             f"(from {URL}) at {path}, or give a text with --data") from None
    return path


def cache_folder() -> Path:
    """Return the user's folder for what is fetched or written once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flattengpt"


def download(url: str, path: Path, size: int, sha256: str) -> None:
    """Fetch a file of known size and SHA-256. It appears complete and verified, or not at all.

    ValueError if the content differs, OSError if it cannot be fetched or stored.
    """
    with complete(path) as file:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read(size + 1)
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{url} is not the expected file ({len(data)} bytes, {size} expected, "
                             f"or another SHA-256); put the right one at {path}")
        file.write(data)


@contextlib.contextmanager
def complete(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to be written, in a folder that is made if need be.

    It appears at `path` at the end; after an error it does not appear at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with open(partial, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
            yield file
        partial.chmod(mode)  # safetensors may have put a file of its own there, for its owner only
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
