"""Train a compressed model for a while, with the dense model as its teacher.

Takes the result of any method that joins neighbours or leaves blocks out. Trained is a LoRA at
every projection, or the last blocks with norm and head (--last), or everything (--full). What the
model learns from is one of four (--loss; see beyond/lessons.py). A LoRA is merged at the end, so
the result is an ordinary checkpoint of the same shapes.

A run is saved beside its output after its first step and every few minutes. After a kill the same
command with --resume goes on from there, and ends with the same weights.

    python -m beyond.recover --ckpt out/NAME-refit-0.2 --teacher PATH
    python -m beyond.recover --ckpt out/NAME-refit-0.2 --teacher PATH --data questions.json
"""
import argparse
import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import console
import parallel
from beyond.lessons import LOSSES, lesson
from beyond.lora import add_lora, merge_lora
from checkpoint.beside import model_card
from checkpoint.config import read_json
from checkpoint.reader import Checkpoint, Weights
from checkpoint.writer import Writer, check_output
from console import command, progress
from console.options import add_device_options, compute_dtype
from evaluate import compare, stop_ids
from model import Transformer, batches, check_ids, load
from text import wikitext
from text.tokenizer import Tokenizer, load_tokenizer

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

MOST_PYTHON = 10_000_000  # characters of Python's library
JUDGED = 16         # held-out windows whose loss is measured
TIMES = 8           # how often in a run
SAVE_EVERY = 300.0  # seconds
MOST = 10**8        # steps, and tokens in a step
OPTIONS = ("loss", "last", "full", "steps", "batch", "length", "rate", "seed", "checkpointing",
           "dtype", "device")


# ---- what belongs together

def correspondence(student: Checkpoint, teacher: Checkpoint) -> tuple[dict, list[list[int]]]:
    """Read a result's flatten.json, and which of the teacher's blocks each block stands for.

    ValueError if the result was not made of this teacher.
    """
    if student.is_wide:
        raise ValueError(f"{student.path} has wide blocks; python flatten.py --ckpt "
                         f"{student.path} makes them ordinary first")
    path = student.path / "flatten.json"
    if not path.is_file():
        raise ValueError(f"{student.path} has no flatten.json: --ckpt must be a result of "
                         "flatten.py, beyond.refit or compare --save")
    record = read_json(path)
    if record.get("source_sha256") != teacher.digest():
        raise ValueError(f"{student.path} was not made of {teacher.path}, or by an earlier version "
                         "(source_sha256 in flatten.json); give the dense model that was "
                         "compressed, or compress again")
    try:
        groups = [[int(i) for i in group["blocks"]] for group in record["groups"]]
        model_card(student.name, student.raw, record)  # will be made again of the same record
        sound = all(groups) and record["parameters_before"] > 0
    except (KeyError, TypeError, ValueError):
        groups, sound = [], False
    blocks = [i for group in groups for i in group]
    if (not sound or blocks != list(range(teacher.config.num_hidden_layers))
            or len(groups) != student.config.num_hidden_layers or len(groups) == len(blocks)):
        raise ValueError(f"{path} does not say which of the teacher's blocks each block stands "
                         "for; recovery is for models made by joining neighbours or leaving "
                         "blocks out")
    return record, groups


def unfreeze(net: Transformer, args: argparse.Namespace) -> None:
    """Let gradients reach what is to be trained, of a frozen model."""
    if args.full:
        net.requires_grad_(True)
    elif args.last:
        head = net.lm_head or net.model["embed_tokens"]  # a tied head is the embedding table
        for part in (*net.model["layers"][-args.last:], net.model["norm"], head):
            part.requires_grad_(True)
    else:
        add_lora(net, args.seed)


def trained_or_stored(now: Weights, stored: Weights) -> Weights:
    """Return the tensors that have changed, in the dtype of the stored ones, and else the stored.

    So what was not trained stays as it is, whatever dtype it was computed in.
    """
    result = {}
    for name, tensor in stored.items():
        new = now[name].cpu()
        same = torch.equal(new, tensor.to(new.dtype))
        result[name] = tensor if same else new.to(tensor.dtype)
    return result


# ---- text to learn from

def is_json(path: str | None) -> bool:
    """Tell whether one of --data is a file of instructions."""
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
        raise ValueError(f"{path}: expected one JSON list of objects with the texts instruction, "
                         f"input and output ({where}{type(error).__name__}: {error})") from None
    if len(texts) < 20:
        raise ValueError(f"{path} has {len(texts)} instructions whose questions are shorter than "
                         f"--length {length}, and at least 20 are needed, of which one judges")
    return texts, file.name


def question_of(row: dict[str, str]) -> str:
    """Word an instruction, and its input if there is one, as a question.

    KeyError, TypeError or AttributeError if they are not texts.
    """
    asked, about = row["instruction"].strip(), row.get("input", "").strip()
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


# ---- the state of a run, on disk

@contextlib.contextmanager
def alone(path: Path, hint: str) -> Iterator[None]:
    """Keep others from writing the state of a run. ValueError if one that lives does so already.

    The system takes the lock back when a process ends, however it ends. An interruption tells where
    the state is, and the hint.
    """
    if fcntl is None or parallel.rank():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {path}; let it end, or choose another "
                             "--out") from None
        try:
            yield
        except KeyboardInterrupt:
            if path.exists():
                print(f"{path} has the run up to its last save; {hint}", file=sys.stderr)
            raise
        finally:
            lock.unlink()


def save_state(path: Path, run: dict, facts: dict, state: Weights) -> None:
    """Write all that a run needs to go on. The file appears complete, or the one before stays.

    It holds the tensors of `state`, and as its metadata what the run is (`run`) and how far it is
    (`facts`).
    """
    if parallel.rank():
        return
    try:
        with wikitext.complete(path) as file:
            save_file(state, file.name, {"run": json.dumps(run), "facts": json.dumps(facts)})
    except SafetensorError as error:  # a full disk, most likely
        raise OSError(f"cannot write {path}: {error}") from None


def read_state(path: Path, run: dict, state: Weights) -> dict:
    """Fill `state` with what is stored, and return the facts: none if nothing is stored.

    An empty `state` asks only whether a run can go on. ValueError if it is another run's.
    """
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            written, facts = (json.loads(file.metadata()[name]) for name in ("run", "facts"))
            differ = [name for name in run | written
                      if run.get(name) != written.get(name) and name != "command"]
            for name, tensor in {} if differ else state.items():
                new = file.get_tensor(name)
                if new.shape != tensor.shape or not new.isfinite().all():
                    raise KeyError(name)
                tensor.copy_(new)
        curve = facts.get("held_out", [[0, 0.0]])
        numbers = [facts["seconds"], facts.get("dense", 0.0), *(n for pair in curve for n in pair)]
        counts = [type(facts["steps"]), type(facts["tokens"]), *(len(pair) for pair in curve)]
        if (counts != [int, int] + [2] * (len(curve) or 1) or not all(map(math.isfinite, numbers))
                or not 0 < facts["steps"] <= written["steps"] or facts["tokens"] < 1
                or facts["seconds"] < 0):
            raise KeyError("its facts")
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, RuntimeError,
            ValueError) as error:
        raise ValueError(f"{path} cannot be read as the state of a run ({error}); choose another "
                         "--out, or delete it if a run has left it") from None
    if differ:
        raise ValueError(f"{path} is of a run with another {', '.join(differ)}; give the same "
                         "options, or delete it")
    return facts


# ---- training

def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down to a tenth."""
    warmup = min(100, max(1, steps // 20))
    if step < warmup:
        return peak * (step + 1) / warmup
    turn = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * turn)) / 2)


def micro_batches(batch: tuple[Tensor, Tensor], device: str) -> Iterator[tuple]:
    """Cut a batch (ids, learned), each (N, T), into parts of about BATCH_TOKENS tokens.

    Of several processes each cuts up its share of the rows.
    Yields ids and learned, on the device, and the part's share of all predictions.
    """
    ids, learned = (parallel.share(part) for part in batch)
    total = int(batch[1][:, 1:].sum())
    for rows in batches(ids):
        if count := int(learned[rows, 1:].sum()):
            yield ids[rows].to(device), learned[rows].to(device), count / total


@torch.no_grad()
def held_out_loss(net: Transformer, batch: tuple[Tensor, Tensor], device: str) -> float:
    """Return the mean loss of what is to be learned of held-out windows, a batch as from `draw`."""
    return parallel.total(sum((share * float(lesson("labels", net, None, [], ids, learned))
                               for ids, learned, share in micro_batches(batch, device)), 0.0))


def sum_gradients(trained: list[Tensor]) -> None:
    """Sum the gradients of all processes, where any process has one."""
    processes = parallel.total(torch.tensor([int(p.grad is not None) for p in trained]))
    for p in (p for p, n in zip(trained, processes, strict=True) if n):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        parallel.total(p.grad)


def train(teach: Callable, net: nn.Module, texts: list, path: Path, run: dict, facts: dict,
          args: argparse.Namespace, judge: Callable[[], float] | None = None) -> dict:
    """Train all of `net` that is not frozen, in float32, from the state at `path` if there is one.

    teach(ids, learned, done) returns a loss, and judge() the held-out loss, if that is wanted. The
    state is saved after the first step, then every few minutes, and at the end. Returns `facts`,
    with how the training went. ValueError names the step whose loss is not finite.
    """
    trained, state = {name: p for name, p in net.named_parameters() if p.requires_grad}, {}
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.95), weight_decay=0.0)
    for name, p in trained.items():
        p.data = p.data.to(torch.float32, copy=True)  # a stored tensor may be a view of its file
        moments = optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                                        "exp_avg_sq": torch.zeros_like(p)}  # as AdamW begins
        state |= {name: p.data, **{f"{name}/{key}": value for key, value in moments.items()}}
    facts = {"steps": 0, "tokens": 0, "seconds": 0.0, **facts, **read_state(path, run, state)}
    if judge and "held_out" not in facts:
        facts["held_out"] = [[facts["tokens"], judge()]]
    seeds = torch.randint(2**31, (args.steps,), generator=torch.Generator().manual_seed(args.seed))
    begin, loss = time.monotonic() - facts["seconds"], math.nan
    saved = -math.inf  # so that the first step is saved, and a full disk told at once

    def line() -> str:
        return f"train: loss {loss:.3f}, {facts['tokens'] / facts['seconds']:.0f} tokens/s, steps"
    left = range(facts["steps"], args.steps)
    for step in progress(left, line, len(left)):
        optimizer.param_groups[0]["lr"] = rate(step, args.steps, args.rate)
        batch, loss, held_out = draw(texts, args.batch, args.length, int(seeds[step])), 0.0, 0.0
        for ids, learned, share in micro_batches(batch, args.device):
            part = share * teach(ids=ids, learned=learned, done=step / args.steps)
            part.backward()
            loss += float(part.detach())
        loss = parallel.total(loss)
        sum_gradients(list(trained.values()))
        norm = float(nn.utils.clip_grad_norm_(trained.values(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        facts |= {"steps": step + 1, "tokens": facts["tokens"] + int(batch[1].sum()),
                  "seconds": time.monotonic() - begin}
        if judge and (step + 1) * TIMES // args.steps > step * TIMES // args.steps:
            held_out = judge()
            facts["held_out"].append([facts["tokens"], held_out])
        if not math.isfinite(loss + norm + held_out):
            raise ValueError(f"the loss of step {step} is not finite; try a smaller --rate than "
                             f"{args.rate:g}")
        if time.monotonic() - saved > SAVE_EVERY:
            save_state(path, run, facts, state)
            saved = time.monotonic()
    save_state(path, run, facts, state)
    return facts


def training_args(parser: argparse.ArgumentParser, rate: float | None) -> argparse.Namespace:
    """Add what every training needs to a parser, with `rate` as a default, and read the arguments.

    ValueError for impossible values.
    """
    add = parser.add_argument
    add("--ckpt", required=True, help="the model to train")
    add("--data", nargs="+",
        help="texts as for flatten.py, or for a recovery JSON files of instructions (objects with "
             "instruction, input, output), in equal shares; the last twentieth of each is held out")
    add("--out", type=Path, help="result (default: in out/, named after the model)")
    for name, value in {"steps": 500, "batch": 16, "length": 512, "seed": 0}.items():
        add(f"--{name}", type=int, default=value, help="default %(default)s")
    add("--rate", type=float, default=rate,
        help="largest learning rate (default: 0.001, with --full or --last 0.0001)")
    add_device_options(parser)
    args = parser.parse_args()
    if (min(args.steps, args.batch) < 1 or args.length < 2
            or max(args.steps, args.batch * args.length) > MOST):
        raise ValueError("--steps and --batch must be at least 1, --length at least 2, and --steps "
                         f"and --batch times --length at most {MOST:,}")
    if not (args.rate is None or 0 < args.rate <= 1) or not 0 <= args.seed < 2**31:
        raise ValueError("--rate must be positive and at most 1, and --seed between 0 and 2^31; "
                         f"got {args.rate} and {args.seed}")
    return args


# ---- the command

def parse_args() -> argparse.Namespace:
    parser = console.parser("Train a compressed model with the dense model as its teacher.",
                            __doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="the dense model that --ckpt was made of")
    add("--loss", choices=LOSSES, default="hidden", help="default: %(default)s")
    add("--last", type=int, default=0, metavar="N",
        help="train the last N blocks, the final norm and the head, without LoRA")
    add("--full", action="store_true", help="train everything, without LoRA")
    add("--checkpointing", action="store_true", help="save memory: run each block twice")
    add("--overwrite", action="store_true", help="replace an earlier result")
    add("--resume", action="store_true", help="go on with a run that was killed, if there is one")
    add("--no-eval", action="store_true", help="do not compare perplexity at the end")
    args = training_args(parser, None)
    if args.full and args.last:
        raise ValueError("--full trains everything and --last a part; give one of them")
    if args.rate is None:
        args.rate = 1e-4 if args.full or args.last else 1e-3
    return args


def learn(groups: list[list[int]], texts: list, held_out: list, dtype: torch.dtype, path: Path,
          run: dict, args: argparse.Namespace) -> tuple[Transformer, dict]:
    """Train the student, from the state at `path` if there is one. Returns it and the facts."""
    judge = partial(held_out_loss, batch=draw(held_out, JUDGED, args.length, seed=0),
                    device=args.device)
    # no cache: it would keep the first bfloat16 copy of weights that change
    with torch.autocast(torch.device(args.device).type, torch.bfloat16,
                        enabled=dtype != torch.float32, cache_enabled=False):
        teacher = load(args.teacher, args.device, dtype)
        facts = {"dense": judge(teacher)}
        if args.loss == "labels":
            teacher = None  # it has nothing more to say, and takes memory
        student = load(args.ckpt, args.device, dtype)
        unfreeze(student, args)
        teach = partial(lesson, args.loss, student, teacher, groups,
                        checkpointing=args.checkpointing)
        facts = train(teach, student, texts, path, run, facts, args, partial(judge, student))
    merge_lora(student)
    return student, facts


def main() -> None:
    args = parse_args()
    source, dense = Checkpoint(args.ckpt), Checkpoint(args.teacher)
    record, groups = correspondence(source, dense)
    if not 0 <= args.last <= len(groups):
        raise ValueError(f"--last {args.last}: the model has {len(groups)} blocks")
    if args.loss == "come" and args.last and all(len(g) == 1 for g in groups[-args.last:]):
        raise ValueError(f"--loss come trains joined blocks, and none of the last {args.last} is "
                         "one; leave out --last")
    dtype = compute_dtype(args.dtype, args.device, source.dtype)
    out = args.out or Path("out") / f"{source.name}-recovered"
    check_output(out, dense.path, args.overwrite)
    no_text = args.no_eval or is_json((args.data or [None])[0])
    judged = None if no_text else wikitext.held_out_text(args.data)
    unfinished = out.with_name(f"{out.name}.unfinished")
    with Writer(out, source, args.overwrite) as writer, \
            alone(unfinished, "--resume goes on there"):
        if unfinished.exists() and not args.resume:
            raise ValueError(f"{unfinished} is of a run that was killed; --resume goes on with "
                             "it, or delete it")
        texts, held_out, about = read_lessons(args, source)
        chosen = {name: getattr(args, name) for name in OPTIONS}
        line = command("-m beyond.recover", ckpt=args.ckpt, teacher=args.teacher, data=args.data,
                       **chosen | {"last": args.last or None})
        run = {**chosen, "processes": parallel.ranks(), "student_sha256": source.digest(),
               "command": line, **about}
        read_state(unfinished, run, {})  # a wrong file is told before the models are loaded
        student, facts = learn(groups, texts, held_out, dtype, unfinished, run, args)
        for k, block in enumerate(student.model["layers"]):
            writer.add(trained_or_stored(block.state_dict(), source.block(k)))
        record["recovery"] = [*record.get("recovery", []), run | facts]
        writer.finish([[k] for k in range(len(groups))], record,
                      outer=trained_or_stored(student.state_dict(), source.outer()))
        unfinished.unlink(missing_ok=True)
    print(f"wrote {out}: {facts['steps']} steps, {facts['tokens']:,} tokens, "
          f"{facts['seconds']:.0f} s; held-out loss "
          f"{facts['held_out'][0][1]:.4f} -> {facts['held_out'][-1][1]:.4f}, of the dense model "
          f"{facts['dense']:.4f}")
    if judged:
        compare([args.teacher, args.ckpt, out], *judged, window=args.length,
                device=args.device, dtype=args.dtype, stream=True)


if __name__ == "__main__":
    console.run(main, torchrun="together")
