"""Multiple-choice tasks, read as published and worded as in EleutherAI's lm-evaluation-harness."""
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from text.wikitext import read


@dataclass
class Item:
    """One question. Choice k is the text contexts[k] followed by continuations[k].

    lengths[k] is the length of choice k in characters, as the harness takes it for acc_norm.
    """
    contexts: list[str]
    continuations: list[str]
    lengths: list[int]
    gold: int                # number of the right choice


def filled(row: dict, name: str) -> str:
    """Return a text of a row. ValueError if it is blank or no text."""
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"{name} must be a text that is not empty")
    return row[name]


def question(context: str, choices: list[str], gold: int) -> Item:
    """Return an item whose choices continue one context, after a space.

    ValueError if context and choices are not all texts, or if `gold` is not the number of a choice.
    """
    if not isinstance(choices, list) or not all(isinstance(text, str) and text.strip()
                                                for text in [context, *choices]):
        raise ValueError("expected a question and choices that are texts and not empty")
    if len(choices) < 2:
        raise ValueError("expected at least two choices")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"the right answer is number {gold!r} of {len(choices)}")
    return Item([context] * len(choices), [" " + choice for choice in choices],
                [len(choice) for choice in choices], gold)


def number(value: str | int) -> int:
    """Return an index as an int; some files write it as text."""
    return int(value) if isinstance(value, str) else value


def piqa(row: dict) -> Item:
    """Read goal, sol1, sol2 and label; the published labels are in a file of their own."""
    return question(f"Question: {filled(row, 'goal')}\nAnswer:", [row["sol1"], row["sol2"]],
                    number(row["label"]))


def winogrande(row: dict) -> Item:
    """Fill the blank of the sentence with each option; what follows the blank is scored."""
    before, after = row["sentence"].split("_")
    if not after.strip():
        raise ValueError("nothing follows the blank")
    contexts = [before + filled(row, "option1"), before + filled(row, "option2")]
    return Item(contexts, [" " + after.strip()] * 2, [len(context) for context in contexts],
                ("1", "2").index(row["answer"]))


def clean(text: str) -> str:
    """Take WikiHow's marks out of a text of HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(row: dict) -> Item:
    """Read ctx_a, ctx_b, activity_label, endings and label.

    A row may also be preprocessed; then it has query, choices and gold.
    """
    if "query" in row:
        return question(row["query"], row["choices"], number(row["gold"]))
    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    if not isinstance(row["endings"], list):
        raise ValueError("endings is not a list")
    return question(context, [clean(ending) for ending in row["endings"]], number(row["label"]))


def science(row: dict, wording: str) -> Item:
    """Read a question of ARC or OpenBookQA: the stem and labelled choices.

    They are nested in "question", or flat as dataset hubs export them.
    """
    inner = row["question"] if isinstance(row.get("question"), dict) else row
    names = [name for name in ("stem", "question_stem") if name in inner]
    stem = filled(inner, (names or ["question"])[0])
    choices = inner["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
        if len(texts) != len(labels):
            raise ValueError("there are not as many labels as choices")
    else:
        texts = [choice["text"] for choice in choices]
        labels = [choice["label"] for choice in choices]
    labels = [str(label) for label in labels]
    if len(set(labels)) < len(labels):
        raise ValueError("two choices have one label")
    gold = labels.index(str(row["answerKey"]).strip())
    return question(wording.format(stem), list(texts), gold)


def arc(row: dict) -> Item:
    """Read a question of ARC."""
    return science(row, "Question: {}\nAnswer:")


def openbookqa(row: dict) -> Item:
    """Read a question of OpenBookQA."""
    return science(row, "{}")


def boolq(row: dict) -> Item:
    """Read passage, question and answer (or label): yes or no."""
    answer = str(row["answer"] if "answer" in row else row["label"]).lower()
    context = f"{filled(row, 'passage')}\nQuestion: {filled(row, 'question')}?\nAnswer:"
    return question(context, ["no", "yes"], {"false": 0, "true": 1, "0": 0, "1": 1}[answer])


@dataclass
class Task:
    """How to find a task's file and make an item of a row, and which metric tables quote."""
    files: tuple[str, ...]  # names as published
    split: str              # in the name of a file that a dataset hub has exported
    item: Callable[[dict], Item]
    metric: str
    home: str               # where the published files come from


ARC = "https://allenai.org/data/arc"
TASKS = {
    "piqa": Task(("valid.jsonl",), "validation", piqa, "acc_norm",
                 "https://yonatanbisk.com/piqa/data/ (and valid-labels.lst)"),
    "winogrande": Task(("dev.jsonl",), "validation", winogrande, "acc",
                       "https://winogrande.allenai.org (winogrande_1.1.zip)"),
    "hellaswag": Task(("hellaswag_val.jsonl", "hellaswag_val.preprocessed.jsonl"), "validation",
                      hellaswag, "acc_norm",
                      "https://github.com/rowanz/hellaswag (data/hellaswag_val.jsonl)"),
    "arc_easy": Task(("ARC-Easy-Test.jsonl",), "test", arc, "acc_norm", ARC),
    "arc_challenge": Task(("ARC-Challenge-Test.jsonl",), "test", arc, "acc_norm", ARC),
    "openbookqa": Task(("test.jsonl",), "test", openbookqa, "acc_norm",
                       "https://allenai.org/data/open-book-qa (Data/Main/test.jsonl)"),
    "boolq": Task(("dev.jsonl", "val.jsonl"), "validation", boolq, "acc",
                  "https://github.com/google-research-datasets/boolean-questions"),
}
# papers on depth pruning quote the average of these
FIVE = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")


def find(task: str, folder: Path) -> Path:
    """Return the task's file: as published, or exported by a dataset hub.

    It lies anywhere in the folder under a path that names the task. An export is a *.jsonl with
    the split in its name and the whole name of the task in its path (arc_easy, ARC-Easy).
    ValueError if there is no such file, or more than one export.
    """
    split, names, family = TASKS[task].split, TASKS[task].files, task.split("_")[0]
    files = {}                                               # path -> what it is called, plainly
    for path in sorted(folder.rglob("*.jsonl")):
        where = f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}"
        files[path] = where.lower().replace("-", "_")
    for name in names:
        for path, where in files.items():
            if path.name == name and family in where:
                return path
    exports = [path for path, where in files.items()
               if task in where and split in re.split("[^a-z]+", path.name.lower())]
    if len(exports) > 1:
        raise ValueError(f"{task}: {exports[0]} and {exports[1]} may both be meant; leave one")
    if not exports:
        raise ValueError(f"{task}: no {' or '.join(names)} in {folder / family}, and no "
                         f"*{split}*.jsonl in {folder / task}; it comes from {TASKS[task].home}")
    return exports[0]


def piqa_labels(path: Path, count: int) -> list[str]:
    """Return the labels of PIQA's published questions, from the file beside them.

    ValueError if there is no such file, or if it does not hold `count` labels.
    """
    beside = path.parent / "valid-labels.lst"
    if not beside.is_file():
        raise ValueError(f"piqa: no valid-labels.lst beside {path}; "
                         f"it comes from {TASKS['piqa'].home}")
    labels = read(beside).decode("utf-8").split()
    if len(labels) != count:
        raise ValueError(f"{path} has {count} questions and valid-labels.lst {len(labels)} labels")
    return labels


def items(task: str, folder: Path) -> list[Item]:
    """Read all items of a task. ValueError names the file and line that is not as published."""
    path, asked = find(task, folder), []
    lines = [(k, line) for k, line in enumerate(read(path).decode("utf-8").split("\n"), 1)
             if line.strip()]
    added = [{}] * len(lines)                                # what a line lacks
    if task == "piqa" and not all('"label"' in line for _, line in lines):
        added = [{"label": label} for label in piqa_labels(path, len(lines))]
    for (k, line), more in zip(lines, added, strict=True):
        try:
            item = TASKS[task].item(json.loads(line) | more)
            "".join(item.contexts + item.continuations).encode()  # no halves of characters
            asked.append(item)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError,
                RecursionError) as error:
            raise ValueError(f"{path} line {k} is not a {task} question "
                             f"({type(error).__name__}: {error!s:.100})") from None
    return asked
