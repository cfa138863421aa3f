"""One training loop, and its state on disk, for everything here that trains.

A run is saved after its first step and every few minutes. After a kill it goes on from there, and
ends with the same weights.
"""
import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import parallel
from beyond.lessons import lesson
from beyond.material import draw
from checkpoint.reader import Weights
from console import progress
from console.options import add_device_options
from model import Transformer, batches
from text import wikitext

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

TIMES = 8           # how often in a run the held-out loss is measured
SAVE_EVERY = 300.0  # seconds
MOST = 10**8        # steps, and tokens in a step


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


def training_args(parser: argparse.ArgumentParser, rate: float | None,
                  rates: str = "%(default)s") -> argparse.Namespace:
    """Add what every training needs to a parser, and read the arguments.

    `rate` is the default of --rate, and `rates` says so in words. ValueError for impossible values.
    """
    add = parser.add_argument
    add("--ckpt", required=True, help="the model to train")
    add("--data", nargs="+",
        help="texts as for flatten.py, but not self; for a recovery also JSON files of "
             "instructions (objects with instruction, input, output); in equal shares, and the "
             "last twentieth of each is held out")
    add("--out", type=Path, help="result (default: in out/, named after the model)")
    for name, value in {"steps": 500, "batch": 16, "length": 512, "seed": 0}.items():
        add(f"--{name}", type=int, default=value, help="default %(default)s")
    add("--rate", type=float, default=rate,
        help=f"largest learning rate (default: {rates})")
    add_device_options(parser)
    args = parser.parse_args()
    if (min(args.steps, args.batch) < 1 or args.length < 2
            or max(args.steps, args.batch * args.length) > MOST):
        raise ValueError("--steps and --batch must be at least 1, --length at least 2, and --steps "
                         f"and --batch times --length at most {MOST:,}")
    if wikitext.SELF in (args.data or []):
        raise ValueError(f"--data {wikitext.SELF} is for calibration; to train give another text")
    if not (args.rate is None or 0 < args.rate <= 1) or not 0 <= args.seed < 2**31:
        raise ValueError("--rate must be positive and at most 1, and --seed between 0 and 2^31; "
                         f"got {args.rate} and {args.seed}")
    return args


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
            lock.unlink(missing_ok=True)


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
