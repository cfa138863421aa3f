"""Perplexity that can be compared with papers, and a short sample, of one or several checkpoints.

The field's protocol: take the WikiText-2 raw test split, its rows joined by a blank line. Tokenize
it in one call, with one BOS at the very start if the tokenizer adds one. Cut it into windows of
2048 tokens without overlap, and drop the incomplete tail. In each window take the mean loss, in
float32, over its 2047 predictions. The perplexity is exp of the mean over windows.

    python evaluate.py --ckpt PATH [PATH ...]              print a table of perplexities
    python evaluate.py --ckpt PATH --stream                the same for a model larger than memory
    python evaluate.py --ckpt PATH --prompt "Once upon"    and a greedy continuation of the prompt

Zero-shot accuracy is a command of its own: python -m compare.zeroshot.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import console
import parallel
from checkpoint.config import read_json
from checkpoint.reader import Checkpoint, Weights
from console import forecast, progress
from console.options import add_device_options, compute_dtype
from model import (
    RMSNorm,
    Runner,
    Transformer,
    batches,
    check_finite,
    check_ids,
    count,
    embed,
    generate,
    load,
    move,
)
from text.tokenizer import load_tokenizer
from text.wikitext import evaluation_text

# ---- errors of a block

def relative_error(output: Tensor, target: Tensor, start: Tensor) -> float:
    """Return the mean over tokens of |output - target| / |target - start|.

    It is the error of a block relative to what it should have added to the stream. All three are
    streams (N, T, C): `output` after the block under test, `target` after the blocks that it stands
    for, `start` before both. Tokens to which nothing should be added do not count. If there are no
    others, the error is 0.
    """
    error = (output.double() - target.double()).norm(dim=-1)
    change = (target.double() - start.double()).norm(dim=-1)
    counted = (error / change)[change != 0]
    tokens = parallel.total(len(counted))
    return parallel.total(float(counted.sum())) / tokens if tokens else 0.0


def through(blocks: list[Weights], xs: Tensor, runner: Runner) -> Tensor:
    """Pass a copy of the stream xs (N, T, C) through these blocks, one after the other."""
    ys = xs.clone()
    for weights in blocks:
        runner.run_block(weights, ys)
    return ys


def probe(xs: Tensor) -> Tensor:
    """Copy the first sixteenth of the windows: enough to measure errors on, and cheap."""
    first = range(max(1, parallel.total(len(xs)) // 16))
    return xs[:len(parallel.share(first))].clone()


# ---- losses, and the divergence of two models

def windows_of(ids: Tensor | list[int], window: int, limit: int | None = None) -> Tensor:
    """Cut token ids (tokens,) into windows (N, window) without overlap, and drop the tail.

    Returns all windows, or the first `limit`.
    """
    if window < 2 or (limit is not None and limit < 1):
        raise ValueError(f"a window has at least 2 tokens, and at least one window is needed; got "
                         f"{window} and {limit}")
    n = len(ids) // window
    if n == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {window}; "
                         "give a longer text or shorter windows")
    return torch.as_tensor(ids[:n * window]).view(n, window)[:limit]


def window_losses(logits_of: Callable, states: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean next-token losses of B windows, (B,) in float32.

    states (B, T, C) are final states, from which logits_of makes logits, and tokens (B, T) are the
    ids; B may be 0. A vocabulary is large, so logits exist for at most 1024 tokens at a time.
    """
    means = []
    for window, ids in zip(states, tokens, strict=True):
        pieces = zip(window[:-1].split(1024), ids[1:].split(1024), strict=True)
        sums = [F.cross_entropy(logits_of(piece).float(), targets, reduction="sum")
                for piece, targets in pieces]
        means.append(torch.stack(sums).sum() / (len(ids) - 1))
    return torch.stack(means) if means else torch.zeros(0, device=states.device)


@torch.inference_mode()
def losses(net: Transformer, windows: Tensor, device: str) -> Tensor:
    """Return the mean losses (N,) of windows (N, T), with the whole model in memory."""
    check_ids(windows, net.config.vocab_size)
    means, slices = [], list(batches(windows))
    for rows in progress(slices, "evaluate: batches", len(slices)):
        ids = windows[rows].to(device)
        means.append(window_losses(net.head, net.hidden(ids), ids))
    return torch.cat(means).cpu()


@torch.inference_mode()
def losses_streamed(source: Checkpoint, windows: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """Return the same mean losses (N,), with one block in memory at a time.

    All windows pass through a block before the next block is read.
    """
    runner, outer = Runner(source.config, windows.shape[1], device, dtype), source.outer()
    needs = forecast.evaluating(source.config, *windows.shape, dtype.itemsize)
    xs = runner.home(embed(outer, windows, dtype), needs)
    L = source.config.num_hidden_layers
    for i in progress(range(L), "evaluate: blocks", L):
        runner.run_block(source.block(i), xs)
    return final_losses(outer, xs, windows, runner)


def readout(outer: Weights, runner: Runner) -> Callable[[Tensor], Tensor]:
    """Return the function from streams (..., C) that leave the last block to logits (..., V)."""
    head = outer.get("lm_head.weight", outer["model.embed_tokens.weight"])
    used = move({"head": head, "norm": outer["model.norm.weight"]}, runner.device, runner.dtype)
    norm = RMSNorm(used["norm"], runner.config.rms_norm_eps)
    return lambda states: F.linear(norm(states), used["head"])


@torch.inference_mode()
def final_losses(outer: Weights, xs: Tensor, windows: Tensor, runner: Runner) -> Tensor:
    """Return the mean losses (N,) of windows (N, T), from the streams that leave the last block.

    These are xs (N, T, C).
    """
    logits_of, means = readout(outer, runner), []
    for _, (states, ids) in runner.batches(xs, windows):
        means.append(window_losses(logits_of, states, ids))
    return torch.cat(means).cpu()


def kullback_leibler(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q), (...), in nats, for the logarithms of predictions p and q (..., V)."""
    return (p.exp() * (p - q)).sum(-1)


@torch.inference_mode()
def divergence(p_of: Callable, xs: Tensor, q_of: Callable, ys: Tensor, device: torch.device,
               distance: Callable[[Tensor, Tensor], Tensor] = kullback_leibler) -> float:
    """Return the mean over tokens of the distance between predictions p and q.

    p_of makes the logits of p from states xs (N, T, C), and q_of those of q from ys. The distance
    is KL(p || q), in nats, or another function of log p and log q. Logits exist for 1024 tokens at
    a time, as above.
    """
    parts = []
    for rows in batches(xs):
        pieces = (states[rows].flatten(0, 1).split(1024) for states in (xs, ys))
        for x, y in zip(*pieces, strict=True):
            p = p_of(x.to(device)).float().log_softmax(-1)
            q = q_of(y.to(device)).float().log_softmax(-1)
            parts.append(distance(p, q).sum())
    sums = torch.stack(parts).cpu()  # once: the device need not stop for each
    return parallel.total(float(sum(sums.tolist()))) / count(xs)


# ---- perplexity

@dataclass
class Score:
    """A model's perplexity, and how it was measured."""
    perplexity: float
    tokens: int      # of the text
    windows: int
    seconds: float


def perplexity(path: str | Path, text: str, window: int = 2048, limit: int | None = None,
               device: str = "cpu", dtype: torch.dtype | None = None,
               stream: bool = False) -> Score:
    """Measure the perplexity of a checkpoint on a text, by the protocol above.

    dtype None computes in the stored one. `stream` keeps one block in memory at a time. ValueError
    if the perplexity is not finite.
    """
    source = Checkpoint(path)
    ids = torch.tensor(load_tokenizer(path).encode(text))
    windows = windows_of(ids, window, limit)
    dtype = dtype or source.dtype
    net = None if stream else load(path, device, dtype)
    start = time.monotonic()
    mine = parallel.share(windows)
    means = parallel.whole(losses_streamed(source, mine, device, dtype) if stream
                           else losses(net, mine, device))
    seconds, result = time.monotonic() - start, means.double().mean().exp()
    check_finite({"the perplexity": result}, str(path))
    return Score(float(result), len(ids), len(windows), seconds)


def too_long(source: Checkpoint, window: int) -> str:
    """Return a remark if windows are longer than the texts that a model was made for, else ""."""
    context = source.config.max_position_embeddings
    if not context or window <= context:
        return ""
    return (f"{source.name} was made for texts of at most {context} tokens; "
            f"these windows have {window}")


def compare(paths: list[str | Path], text: str, name: str, window: int = 2048,
            limit: int | None = None, device: str = "cpu", dtype: str | None = None,
            stream: bool = False) -> list[float]:
    """Print the protocol and a table of perplexities, each row as soon as it is known.

    `name` says what the text is. Notes about the text and the checkpoints follow the table, each of
    them once. Returns the perplexities.
    """
    sources, notes, found = [Checkpoint(path) for path in paths], [], []
    dtypes = [compute_dtype(dtype, device, source.dtype) for source in sources]
    kinds = dict.fromkeys(str(kind).removeprefix("torch.") for kind in dtypes)
    for k, (source, kind) in enumerate(zip(sources, dtypes, strict=True)):
        score = perplexity(source.path, text, window, limit, device, kind, stream)
        found.append(score.perplexity)
        if k == 0:  # nothing has been wrong with the request
            print(f"perplexity: windows of {window} tokens, no overlap, tail dropped, tokenizer's "
                  f"own BOS at the start of the text, loss in float32, model in {', '.join(kinds)}")
            print("| checkpoint | parameters | blocks | size | perplexity | tokens/s |")
            print("|---|---|---|---|---|---|")
        parameters, size = source.size()
        print(f"| {source.name} | {parameters:,} | {source.config.num_hidden_layers} | "
              f"{size / 1e6:,.1f} MB | {score.perplexity:.4f} | "
              f"{score.windows * window / score.seconds:,.0f} |", flush=True)
        if remark := too_long(source, window):
            notes.append(f"({remark})")
        subset = f", SUBSET: the first {score.windows} windows only" if limit else ""
        notes.append(f"({name}: {score.tokens} tokens, {score.windows} windows of {window}"
                     f"{subset})")
    print("\n".join(dict.fromkeys(notes)))
    return found


# ---- samples

def sample(path: str | Path, prompt: str, device: str, dtype: torch.dtype, tokens: int = 60) -> str:
    """Continue a prompt greedily, until the model ends it or `tokens` are added. Returns both."""
    tokenizer, net = load_tokenizer(path), load(path, device, dtype)
    ids = torch.tensor([tokenizer.encode(prompt)], device=device)
    return tokenizer.decode(generate(net, ids, tokens, stop=stop_ids(Path(path)))[0].tolist())


def stop_ids(path: Path) -> tuple[int, ...]:
    """Read the ids that end a text: from generation_config.json, else from config.json."""
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            eos = read_json(path / name).get("eos_token_id")
            listed = eos if isinstance(eos, list) else [eos]
            if stop := tuple(i for i in listed if type(i) is int and 0 <= i < 2**31):
                return stop
    return ()


def main() -> None:
    parser = console.parser("Measure the perplexity of checkpoints.", __doc__)
    parser.add_argument("--ckpt", required=True, nargs="+", help="one or more checkpoint folders")
    parser.add_argument("--data", help="a folder with wiki.test.raw, the WikiText-2 zip, any text "
                                       "file, or 'python' for Python's own library "
                                       "(default: WikiText-2, downloaded once)")
    parser.add_argument("--window", type=int, default=2048,
                        help="tokens in a window (default 2048)")
    parser.add_argument("--max-windows", type=int,
                        help="use at most this many windows: quicker, but not the field's number")
    parser.add_argument("--stream", action="store_true",
                        help="keep one block in memory at a time; the numbers stay the same")
    parser.add_argument("--prompt", help="also continue this text")
    add_device_options(parser)
    args = parser.parse_args()
    if args.window < 2 or (args.max_windows is not None and args.max_windows < 1):
        raise ValueError("--window must be at least 2, and --max-windows at least 1")
    if args.prompt and args.stream:
        raise ValueError("--prompt needs the whole model in memory, which --stream avoids; "
                         "give one of them")
    if args.prompt:
        args.prompt.encode("utf-8")  # a ValueError now rather than a crash inside a tokenizer
    sources = [Checkpoint(path) for path in args.ckpt]  # all, before the first takes its time
    compare(args.ckpt, *evaluation_text(args.data), args.window, args.max_windows, args.device,
            args.dtype, args.stream)
    for source in sources if args.prompt else []:
        dtype = compute_dtype(args.dtype, args.device, source.dtype)
        print(f"\n{source.name}: {sample(source.path, args.prompt, args.device, dtype)}")


if __name__ == "__main__":
    console.run(main, torchrun="together")
