"""Multiple choice by log-likelihood, as EleutherAI's lm-evaluation-harness does it.

Each choice is scored by the log-probability that the model gives its tokens after the question; the
likeliest is the answer.

    python -m compare.zeroshot --ckpt PATH [PATH ...] --tasks piqa,arc_easy --data FOLDER
"""
import argparse
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import console
import parallel
from checkpoint.reader import Checkpoint
from compare.tasks import FIVE, TASKS, Item, items
from console import forecast, progress
from console.options import add_device_options, compute_dtype
from evaluate import readout
from model import Runner, check_finite, embed
from text.tokenizer import Tokenizer, load_tokenizer

CHUNK = 2**18  # tokens of questions whose streams are in memory together


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str,
                bos: str = "own") -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation, split as lm-evaluation-harness does it.

    Both are tokenized together, and the context alone. If the context alone has k ids, the first k
    ids of both are its own, and the rest are the continuation's. Spaces at the end of the context
    count as the continuation's.

    A BOS in front is the context's. The tokenizer adds one or not, as is its habit; with
    bos="never" there is none. An empty context is BOS in any case.
    """
    def encode(text: str, drop_bos: bool) -> list[int]:
        ids = tokenizer.encode(text)
        return ids[1:] if tokenizer.add_bos and drop_bos else ids
    stripped = context.rstrip()
    continuation = context[len(stripped):] + continuation
    if not stripped:
        if tokenizer.bos_id is None:
            raise ValueError("a question without a context needs a tokenizer with BOS")
        return [tokenizer.bos_id], encode(continuation, drop_bos=True)
    first = encode(stripped, bos == "never")
    return first, encode(stripped + continuation, bos == "never")[len(first):]


def parts_of(lengths: list[int]) -> list[list[int]]:
    """Split texts of these lengths into parts of about CHUNK tokens, the shortest texts first.

    Returns the indices of the texts in each part.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    parts = {}
    for r, tokens_so_far in zip(order, accumulate(lengths[r] for r in order), strict=True):
        parts.setdefault(tokens_so_far // CHUNK, []).append(r)
    return list(parts.values())


def padded(texts: list[list[int]], T: int) -> Tensor:
    """Return the ids of the texts as one tensor (texts, T), with zeros at the end of each row."""
    ids = torch.zeros(len(texts), T, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[:len(text)] = torch.tensor(text)
    return ids


@torch.inference_mode()
def log_likelihoods(source: Checkpoint, pairs: list[tuple[list[int], list[int]]], device: str,
                    dtype: torch.dtype) -> Tensor:
    """Return the sum of log p of each continuation's tokens after its context, (pairs,), float32.

    Only one block is in memory at a time. A text longer than the model's context loses its front.
    """
    longest, outer = source.config.max_position_embeddings or 2048, source.outer()
    texts = [(context + continuation)[-longest - 1:] for context, continuation in pairs]
    inputs = [text[:-1] for text in texts]                   # after the last id nothing is asked
    scores = torch.zeros(len(pairs), device=device)
    parts = parts_of([len(text) for text in texts])
    for number, part in enumerate(parts, 1):
        # Texts run together if their lengths, rounded up to a multiple of 16, are equal. The end of
        # each is padded. That changes nothing: attention is causal, so no token sees the padding.
        batches = {}                                         # padded length T -> indices of texts
        for r in part:
            T = min((len(inputs[r]) + 15) // 16 * 16, longest)
            batches.setdefault(T, []).append(r)
        runners = {T: Runner(source.config, T, device, dtype) for T in batches}
        any_runner, L = next(iter(runners.values())), source.config.num_hidden_layers
        ids = {T: padded([texts[r] for r in batch], T + 1) for T, batch in batches.items()}
        flat = torch.cat([embed(outer, rows[:, :-1].flatten(), dtype) for rows in ids.values()])
        needs = forecast.evaluating(source.config, len(flat), 1, dtype.itemsize)
        pieces = any_runner.home(flat, needs).split([T * len(rows) for T, rows in ids.items()])
        streams = {T: piece.view(-1, T, piece.shape[1])
                   for T, piece in zip(ids, pieces, strict=True)}
        for i in progress(range(L), f"part {number} of {len(parts)}: blocks", L):
            block = any_runner.block(source.block(i))
            for T, runner in runners.items():
                runner.update(streams[T], partial(block, rope=runner.rope))
        logits_of = readout(outer, any_runner)
        for T, batch in batches.items():
            for r, states, text in zip(batch, streams[T], ids[T].to(device), strict=True):
                end = len(inputs[r])
                if not pairs[r][1]:
                    raise ValueError("a choice adds no token to its question: "
                                     "this tokenizer cannot be scored on it")
                start = end - min(len(pairs[r][1]), end)     # states that predict the continuation
                logits = logits_of(states[start:end].to(device)).float()
                scores[r] = -F.cross_entropy(logits, text[start + 1:end + 1], reduction="sum")
    return scores.cpu()


def by_question(questions: list[Item], values: Tensor) -> list[Tensor]:
    """Split values of all choices, question after question, into one tensor a question."""
    return values.split([len(item.contexts) for item in questions])


def accuracies(questions: list[Item], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return acc and acc_norm of each question, 1 or 0, in two tensors (questions,).

    acc asks whether the right choice is the likeliest, acc_norm whether it is the likeliest per
    character; ties go to the first. `scores` are the log-likelihoods of all choices, question after
    question. The harness calls acc_norm normalised by bytes, and divides by characters; so do we.
    """
    plain, normed = [], []
    for item, own in zip(questions, by_question(questions, scores.double()), strict=True):
        characters = torch.tensor(item.lengths).clamp_min(1)
        plain.append(float(int(own.argmax()) == item.gold))
        normed.append(float(int((own / characters).argmax()) == item.gold))
    return torch.tensor(plain, dtype=torch.float64), torch.tensor(normed, dtype=torch.float64)


def right_losses(questions: list[Item], scores: Tensor, lengths: list[int]) -> Tensor:
    """Return the loss of each question's right choice, in nats a token, (questions,).

    It tells small models apart where accuracy cannot. `scores` and `lengths` (in tokens) are those
    of all choices, question after question.
    """
    each = zip(questions, by_question(questions, scores),
               by_question(questions, torch.tensor(lengths)), strict=True)
    losses = [-float(own[item.gold]) / max(1, int(tokens[item.gold])) for item, own, tokens in each]
    return torch.tensor(losses, dtype=torch.float64)


def with_error(values: Tensor, digits: int) -> str:
    """Return the mean as text, with its standard error if there are several values."""
    mean = f"{values.mean():.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {values.std() / len(values) ** 0.5:.{digits}f}"


def task_names(args: argparse.Namespace) -> list[str]:
    """Return the tasks asked for. ValueError for an unknown task or an impossible limit."""
    names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",")))
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"--tasks: unknown {', '.join(map(repr, unknown))}; "
                         f"there are {','.join(TASKS)}")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1; got {args.limit}")
    return names


def zero_shot(args: argparse.Namespace) -> None:
    """Print accuracy and loss of each checkpoint on each task, with standard errors.

    The papers' average of five tasks follows if all five are there. ValueError for a task whose
    file is not in the folder.
    """
    questions = {name: items(name, Path(args.data))[:args.limit] for name in task_names(args)}
    models = [(Checkpoint(path), load_tokenizer(path)) for path in args.ckpt]
    with_bos = dict.fromkeys(source.name for source, tokenizer in models
                             if tokenizer.add_bos and args.bos == "own")
    front = f"BOS in front for {', '.join(with_bos)}" if with_bos else "no BOS in front"
    subset = f"; SUBSET: the first {args.limit} questions of each task only" if args.limit else ""
    print("zero-shot, log-likelihood of the choices, worded and split as in "
          f"lm-evaluation-harness; {front} (--bos {args.bos}){subset}")
    print("| checkpoint | task | questions | acc | acc_norm | quoted | "
          "loss of the right choice, nats a token |\n|---|---|---|---|---|---|---|")
    for path, (source, tokenizer) in zip(args.ckpt, models, strict=True):
        dtype, quoted = compute_dtype(args.dtype, args.device, source.dtype), {}
        for name, asked in questions.items():
            mine = parallel.share(asked)
            choices = [choice for item in mine
                       for choice in zip(item.contexts, item.continuations, strict=True)]
            pairs = [encode_pair(tokenizer, *choice, args.bos) for choice in choices]
            scores = log_likelihoods(source, pairs, args.device, dtype)
            check_finite({"a log-likelihood": scores}, str(path))
            loss = right_losses(mine, scores, [len(continuation) for _, continuation in pairs])
            acc, acc_norm, loss = map(parallel.whole, (*accuracies(mine, scores), loss))
            metric = TASKS[name].metric
            quoted[name] = 100 * float((acc if metric == "acc" else acc_norm).mean())
            cells = [source.name, name, str(len(asked)), with_error(100 * acc, 2),
                     with_error(100 * acc_norm, 2), metric, with_error(loss, 4)]
            print(f"| {' | '.join(cells)} |", flush=True)
        if set(FIVE) <= quoted.keys():
            average = sum(quoted[name] for name in FIVE) / 5
            print(f"| {source.name} | average of five | | | {average:.2f} | "
                  "acc_norm, WinoGrande acc | |")


def main() -> None:
    parser = console.parser("Measure zero-shot accuracy of checkpoints.", __doc__)
    parser.add_argument("--ckpt", required=True, nargs="+", help="one or more checkpoint folders")
    parser.add_argument("--tasks", required=True,
                        help=f"names with commas between, of {', '.join(TASKS)}")
    parser.add_argument("--data", required=True, help="the folder with the tasks' files")
    parser.add_argument("--limit", type=int,
                        help="only the first questions of each task: not the field's number")
    parser.add_argument("--bos", choices=("own", "never"), default="own",
                        help="own: BOS in front if the tokenizer adds one (default, as "
                             "lm-evaluation-harness since autumn 2025); never: none, as before")
    add_device_options(parser)
    zero_shot(parser.parse_args())


if __name__ == "__main__":
    console.run(main, torchrun="together")
