"""The text that a training learns from: plain text, or instructions of which it learns the answers.

The last twentieth of each text is held out, and judges.
"""
import argparse
import hashlib
import json
from functools import partial

import torch
from torch import Tensor, nn

from checkpoint.reader import Checkpoint
from evaluate import stop_ids
from model import check_ids
from text import wikitext
from text.tokenizer import Tokenizer, load_tokenizer

MOST_PYTHON = 10_000_000  # characters of Python's library


def is_json(path: str | None) -> bool:
    """Tell whether one of --data is a file of instructions. One of JSON lines is refused later."""
    return str(path).lower().endswith((".json", ".jsonl"))


def read_lesson(path: str | None, tokenizer: Tokenizer, stop: tuple[int, ...],
                length: int) -> tuple[list | Tensor, str]:
    """Read one --data: the ids (tokens,) of a text, or a list of instructions; and its name.

    Instructions are a JSON list of objects with instruction, input and output. Each becomes its
    ids, and the number of those that belong to the question. ValueError for anything else.
    """
    if not is_json(path):
        text, name = wikitext.calibration_text(path, MOST_PYTHON)
        ids = torch.tensor(tokenizer.encode(text))
        if len(ids) < 20 * length:
            raise ValueError(f"{name} has {len(ids)} tokens, fewer than twenty windows of "
                             f"--length {length}, of which one judges; give a longer text")
        return ids, name
    file, texts, where = wikitext.find(path), [], ""
    try:
        for row in json.loads(wikitext.read(file)):
            where = f"{json.dumps(row)[:60]}: "
            question = question_of(row)
            whole = question + row["output"].strip()
            whole.encode("utf-8")  # JSON can hold halves of characters
            asked = len(tokenizer.encode(question))
            ids = torch.tensor([*tokenizer.encode(whole), *stop[:1]][:length])
            texts += [(ids, asked)] if asked < len(ids) else []
    except (TypeError, KeyError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: expected one JSON list (not JSON lines) of objects with the "
                         "texts instruction, input and output "
                         f"({where}{type(error).__name__}: {error})") from None
    if len(texts) < 20:
        raise ValueError(f"{path} has {len(texts)} instructions whose questions are shorter than "
                         f"--length {length}, and at least 20 are needed, of which one judges; "
                         "give more, or a larger --length")
    return texts, file.name


def question_of(row: dict[str, str]) -> str:
    """Word an instruction, and its input if there is one, as a question.

    KeyError, TypeError or AttributeError if they are not texts.
    """
    asked, about = row["instruction"].strip(), (row.get("input") or "").strip()
    middle = f"### Input:\n{about}\n\n" if about else ""
    return f"### Instruction:\n{asked}\n\n{middle}### Response:\n"


def split(text: list | Tensor) -> tuple[list | Tensor, list | Tensor]:
    """Cut the last twentieth off a text: it judges, and is never learned from."""
    end = len(text) - len(text) // 20
    return text[:end], text[end:]


def draw(texts: list, n: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw n windows of at most `length` tokens, out of the texts in turn.

    Returns ids (n, T), and which of them are to be learned, (n, T): all of a plain text, the
    answers of instructions.
    """
    generator = torch.Generator().manual_seed(seed)

    def any_of(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))
    first, rows = any_of(len(texts)), []
    for turn in range(first, first + n):
        text = texts[turn % len(texts)]
        if isinstance(text, Tensor):
            start = any_of(len(text) - length + 1)
            rows.append((text[start:start + length], 0))
        else:
            rows.append(text[any_of(len(text))])
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return (pad([row for row, _ in rows]),
            pad([torch.arange(len(row)) >= asked for row, asked in rows]))


def read_lessons(args: argparse.Namespace, source: Checkpoint) -> tuple[list, list, dict]:
    """Read all of --data. Returns the texts, the held-out end of each, and what they are."""
    tokenizer, stop = load_tokenizer(source.path), stop_ids(source.path)
    read = [read_lesson(path, tokenizer, stop, args.length) for path in args.data or [None]]
    sha256 = hashlib.sha256()
    for text, _ in read:
        for ids in [text] if isinstance(text, Tensor) else [ids for ids, _ in text]:
            check_ids(ids, source.config.vocab_size)
            sha256.update(ids.numpy().tobytes())
    texts, held_out = zip(*(split(text) for text, _ in read), strict=True)
    return texts, held_out, {"text": " + ".join(name for _, name in read),
                             "sha256_of_ids": sha256.hexdigest()}
