"""Multiple choice by log-likelihood, as EleutherAI's lm-evaluation-harness does it.

Each choice is scored by the log-probability that the model gives its tokens after the question; the likeliest is the
answer. evaluate.py --tasks runs this.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from calibrate import Runner, check_finite, compute_dtype, embed
from checkpoint.reader import Checkpoint
from console import progress
from evaluate import readout
from text.tokenizer import Tokenizer, load_tokenizer
from zeroshot.tasks import FIVE, TASKS, Item, items

CHUNK = 2**18  # tokens of questions whose streams are in memory together


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str,
                bos: str = "own") -> tuple[list[int], list[int]]:
    """Ids of a context and of what continues it, split as lm-evaluation-harness does it.

    Both are tokenized together; the ids beyond as many as the context alone has are the
    continuation's. A BOS in front is the context's: the tokenizer's own habit, or with bos="never"
    none. Spaces at the end of the context count as the continuation's. An empty context is BOS.
    """
    def encode(text: str, skip: bool) -> list[int]:
        ids = tokenizer.encode(text)
        return ids[1:] if tokenizer.add_bos and skip else ids
    stripped = context.rstrip()
    continuation = context[len(stripped):] + continuation
    if not stripped:
        if tokenizer.bos_id is None:
            raise ValueError("a question without a context needs a tokenizer with BOS")
        return [tokenizer.bos_id], encode(continuation, skip=True)
    first = encode(stripped, bos == "never")
    return first, encode(stripped + continuation, bos == "never")[len(first):]


@torch.inference_mode()
def log_likelihoods(source: Checkpoint, pairs: list[tuple[list[int], list[int]]], device: str, dtype: torch.dtype) -> Tensor:
    """Sum of log p of each continuation's tokens after its context, (pairs,) float32, one block in memory at a time.

    Texts of about one length run together, padded at their end, where causal attention does not look. What exceeds the
    model's context is cut off at the front.
    """
    longest, outer, found = source.config.max_position_embeddings or 2048, source.outer(), torch.zeros(len(pairs))
    texts = [(context + continuation)[-longest - 1:] for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda r: len(texts[r]))
    parts = torch.tensor([len(texts[r]) for r in order]).cumsum(0) // CHUNK            # which part of the work each is in
    for part in range(int(parts[-1]) + 1 if order else 0):
        groups = {}                                                                     # padded length -> pairs
        for r in (r for r, where in zip(order, parts.tolist(), strict=True) if where == part):
            groups.setdefault(min(-(-(len(texts[r]) - 1) // 16) * 16, longest), []).append(r)
        runners, streams = {T: Runner(source, T, device, dtype) for T in groups}, {}
        for T, members in groups.items():
            ids = torch.zeros(len(members), T, dtype=torch.long)
            for row, r in zip(ids, members, strict=True):
                row[:len(texts[r]) - 1] = torch.tensor(texts[r][:-1])
            streams[T] = embed(outer, ids, dtype)
        L = source.config.num_hidden_layers
        for i in progress(range(L), f"part {part + 1} of {int(parts[-1]) + 1}: blocks", L):
            block = runners[T].block(source.block(i))
            for T in groups:
                runners[T].update(streams[T], lambda x, rope=runners[T].rope: block(x, rope))  # noqa: B023
        logits_of = readout(outer, runners[T])
        for T, members in groups.items():
            for states, r in zip(streams[T], members, strict=True):
                n = min(len(pairs[r][1]), len(texts[r]) - 1)                                    # tokens to predict
                logits = logits_of(states[len(texts[r]) - 1 - n:len(texts[r]) - 1].to(device)).float()
                targets = torch.tensor(texts[r][len(texts[r]) - n:], device=logits.device)
                found[r] = -F.cross_entropy(logits, targets, reduction="sum")
    return found


def accuracies(questions: list[Item], scores: Tensor) -> tuple[Tensor, Tensor]:
    """(acc, acc_norm) of each question, 1 or 0: is the right choice the likeliest, and the likeliest per character?

    scores holds the log-likelihoods of all choices, question after question. Of equals the first counts. The harness
    calls the second normalised by bytes, and divides by the length in characters; so does this.
    """
    plain, normed, start = [], [], 0
    for item in questions:
        own = scores[start:start + len(item.contexts)].double()
        start += len(own)
        plain.append(float(int(own.argmax()) == item.gold))
        normed.append(float(int((own / torch.tensor(item.lengths).clamp_min(1)).argmax()) == item.gold))
    return torch.tensor(plain, dtype=torch.float64), torch.tensor(normed, dtype=torch.float64)


def with_error(values: Tensor, digits: int) -> str:
    """The mean, and its standard error if there are several values."""
    error = f" ± {values.std() / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


def right_losses(questions: list[Item], scores: Tensor, lengths: list[int]) -> Tensor:
    """Loss of each question's right choice, nats a token, (questions,): it tells small models apart where accuracy cannot.

    scores and lengths (in tokens) are of all choices, question after question.
    """
    losses, start = [], 0
    for item in questions:
        losses.append(-float(scores[start + item.gold]) / max(1, lengths[start + item.gold]))
        start += len(item.contexts)
    return torch.tensor(losses, dtype=torch.float64)


def zero_shot(paths: list[str | Path], tasks: str, folder: str | None, limit: int | None = None, device: str = "cpu",
              dtype: str | None = None, bos: str = "own") -> None:
    """Print accuracy and loss of each checkpoint on each task, and the papers' average if its tasks are there.

    With standard errors. tasks is a list with commas. ValueError for a task that is not known or whose file is not in the
    folder.
    """
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"--tasks: unknown {', '.join(map(repr, unknown))}; there are {','.join(TASKS)}")
    if folder is None:
        raise ValueError("--tasks needs --data, the folder with the tasks' files")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1; got {limit}")
    questions = {name: items(name, Path(folder))[:limit] for name in names}
    models = [(Checkpoint(path), load_tokenizer(path)) for path in paths]
    added = dict.fromkeys(source.name for source, tokenizer in models
                          if tokenizer.add_bos and bos == "own")
    print("zero-shot, log-likelihood of the choices, worded and split as in lm-evaluation-harness; "
          + (f"BOS in front for {', '.join(added)}" if added else "no BOS in front")
          + f" (--bos {bos})"
          + (f"; SUBSET: the first {limit} questions of each task only" if limit else ""))
    print("| checkpoint | task | questions | acc | acc_norm | quoted | loss of the right choice, nats a token |\n"
          "|---|---|---|---|---|---|---|")
    for path, (source, tokenizer) in zip(paths, models, strict=True):
        quoted = {}
        kind = compute_dtype(dtype, device, source.dtype)
        for name, asked in questions.items():
            pairs = [encode_pair(tokenizer, context, continuation, bos) for item in asked
                     for context, continuation in zip(item.contexts, item.continuations, strict=True)]
            scores = log_likelihoods(source, pairs, device, kind)
            check_finite({"a log-likelihood": scores}, str(path))
            found = dict(zip(("acc", "acc_norm"), accuracies(asked, scores), strict=True))
            cells = [with_error(100 * hits, 2) for hits in found.values()]
            loss = with_error(right_losses(asked, scores, [len(continuation) for _, continuation in pairs]), 4)
            quoted[name] = 100 * float(found[TASKS[name].metric].mean())
            print(f"| {source.name} | {name} | {len(asked)} | {' | '.join(cells)} | {TASKS[name].metric} | "
                  f"{loss} |", flush=True)
        if set(FIVE) <= quoted.keys():
            print(f"| {source.name} | average of five | | | {sum(quoted[name] for name in FIVE) / 5:.2f} | "
                  "acc_norm, WinoGrande acc | |")
