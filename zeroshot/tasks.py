"""Multiple-choice tasks in the form their authors publish them, worded as EleutherAI's lm-evaluation-harness words them."""
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from text.wikitext import read


@dataclass
class Item:
    """One question. Choice k is the text contexts[k] continued by continuations[k]; `lengths` in characters is for acc_norm,
    the length of the choice as the harness takes it."""
    contexts: list[str]
    continuations: list[str]
    lengths: list[int]
    gold: int


def question(context: str, choices: list[str], gold: int) -> Item:
    """An item whose choices continue one context, after a space. ValueError if they are not texts, gold none of them."""
    if not isinstance(choices, list) or not all(isinstance(text, str) and text.strip() for text in [context, *choices]):
        raise ValueError("expected a question and choices that are texts and not empty")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"the right answer is number {gold!r} of {len(choices)}")
    return Item([context] * len(choices), [" " + choice for choice in choices], [len(choice) for choice in choices], gold)


def number(value: str | int) -> int:
    """An index, which some files write as text."""
    return int(value) if isinstance(value, str) else value


def piqa(row: dict) -> Item:
    """goal, sol1, sol2 and label, which the published form keeps in a file of its own."""
    return question(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], number(row["label"]))


def winogrande(row: dict) -> Item:
    """Partial scoring: the options fill the blank of the context, and what follows the blank is what is scored."""
    before, after = row["sentence"].split("_")
    if not after.strip():
        raise ValueError("nothing follows the blank")
    contexts = [before + row["option1"], before + row["option2"]]
    return Item(contexts, [" " + after.strip()] * 2, [len(context) for context in contexts], ("1", "2").index(row["answer"]))


def clean(text: str) -> str:
    """HellaSwag's texts without WikiHow's marks."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(row: dict) -> Item:
    """ctx_a, ctx_b, activity_label, endings, label; or, preprocessed already, query, choices, gold."""
    if "query" in row:
        return question(row["query"], row["choices"], number(row["gold"]))
    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    if not isinstance(row["endings"], list):
        raise ValueError("endings is not a list")
    return question(context, [clean(ending) for ending in row["endings"]], number(row["label"]))


def science(row: dict, wording: str) -> Item:
    """ARC and OpenBookQA: the stem and labelled choices, nested in "question" or flat."""
    inner = row["question"] if isinstance(row.get("question"), dict) else row
    stem = inner[next((name for name in ("stem", "question_stem") if name in inner), "question")]
    if not isinstance(stem, str):
        raise ValueError("the question is not a text")
    choices = inner["choices"]
    if isinstance(choices, dict):
        choices = [{"text": text, "label": label} for text, label in zip(choices["text"], choices["label"], strict=True)]
    gold = [str(choice["label"]) for choice in choices].index(str(row["answerKey"]).strip())
    return question(wording.format(stem), [choice["text"] for choice in choices], gold)


def boolq(row: dict) -> Item:
    """passage, question, answer (or label): yes or no."""
    answer = str(row["answer"] if "answer" in row else row["label"]).lower()
    if not isinstance(row["passage"], str) or not isinstance(row["question"], str):
        raise ValueError("passage and question must be texts")
    return question(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"],
                    {"false": 0, "true": 1, "0": 0, "1": 1}[answer])


@dataclass
class Task:
    """How to find a task's file, make an item of a row, and which metric tables quote."""
    files: tuple[str, ...]  # as published
    split: str              # in the name of a file that a dataset hub has exported
    item: Callable[[dict], Item]
    metric: str
    home: str


ARC = "https://allenai.org/data/arc"
TASKS = {
    "piqa": Task(("valid.jsonl",), "validation", piqa, "acc_norm",
                 "https://yonatanbisk.com/piqa/data/ (and valid-labels.lst)"),
    "winogrande": Task(("dev.jsonl",), "validation", winogrande, "acc",
                       "https://winogrande.allenai.org (winogrande_1.1.zip)"),
    "hellaswag": Task(("hellaswag_val.jsonl", "hellaswag_val.preprocessed.jsonl"), "validation",
                      hellaswag, "acc_norm",
                      "https://github.com/rowanz/hellaswag (data/hellaswag_val.jsonl)"),
    "arc_easy": Task(("ARC-Easy-Test.jsonl",), "test",
                     lambda row: science(row, "Question: {}\nAnswer:"), "acc_norm", ARC),
    "arc_challenge": Task(("ARC-Challenge-Test.jsonl",), "test",
                          lambda row: science(row, "Question: {}\nAnswer:"), "acc_norm", ARC),
    "openbookqa": Task(("test.jsonl",), "test", lambda row: science(row, "{}"), "acc_norm",
                       "https://allenai.org/data/open-book-qa (Data/Main/test.jsonl)"),
    "boolq": Task(("dev.jsonl", "val.jsonl"), "validation", boolq, "acc",
                  "https://github.com/google-research-datasets/boolean-questions"),
}
FIVE = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")  # the average that papers on depth pruning quote


def find(task: str, folder: Path) -> Path:
    """The task's file, anywhere in the folder under a path that names the task.

    First the published names; then an export: a *.jsonl with the split in its name, and the task in
    full in its path (arc_easy, ARC-Easy). ValueError if there is none, or more than one.
    """
    files = {path: str(folder.resolve().name / path.relative_to(folder)).lower().replace("-", "_")
             for path in sorted(folder.rglob("*.jsonl"))}
    for name in TASKS[task].files:
        for path, where in files.items():
            if path.name == name and task.split("_")[0] in where:
                return path
    split = TASKS[task].split
    found = [path for path, where in files.items()
             if task in where and split in re.split("[^a-z]+", path.name.lower())]
    if len(found) > 1:
        raise ValueError(f"{task}: {found[0]} and {found[1]} may both be meant; leave one")
    if not found:
        raise ValueError(f"{task}: no {' or '.join(TASKS[task].files)} in "
                         f"{folder / task.split('_')[0]}, and no *{split}*.jsonl in "
                         f"{folder / task}; it comes from {TASKS[task].home}")
    return found[0]


def items(task: str, folder: Path) -> list[Item]:
    """All items of a task. ValueError names the file and line that is not in the published form."""
    path = find(task, folder)
    rows = [row for row in read(path).decode("utf-8").split("\n") if row.strip()]
    labels = []
    if task == "piqa" and not all('"label"' in row for row in rows):  # as published
        if not (path.parent / "valid-labels.lst").is_file():
            raise ValueError(f"piqa: no valid-labels.lst beside {path}; it comes from {TASKS[task].home}")
        labels = read(path.parent / "valid-labels.lst").decode("utf-8").split()
        if len(labels) != len(rows):
            raise ValueError(f"{path} has {len(rows)} questions and valid-labels.lst {len(labels)} labels")
    found = []
    for number, line in enumerate(rows, 1):
        try:
            found.append(TASKS[task].item(json.loads(line) | ({"label": labels[number - 1]} if labels else {})))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not a {task} question ({type(error).__name__}: {error!s:.100})"
                             ) from None
    return found
