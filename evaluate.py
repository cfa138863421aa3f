"""Perplexity that can be compared with papers, and a short sample, of one or several checkpoints.

The field's protocol: the WikiText-2 raw test split, rows joined by a blank line, tokenized in one call (one BOS at the
very start, if the tokenizer adds one), cut into windows of 2048 tokens without overlap, the incomplete tail dropped. In
each window the mean loss, in float32, over its 2047 predictions; the perplexity is exp of the mean over windows.

    python evaluate.py --ckpt PATH [PATH ...]              a table; --stream for models larger than memory
    python evaluate.py --ckpt PATH --prompt "Once upon"    and a greedy continuation, to see what the number means
    python evaluate.py --ckpt PATH --tasks piqa,boolq --data D      zero-shot accuracy on local files instead
"""
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import console
from calibrate import DTYPES, Runner, batches, check_finite, compute_dtype, embed
from checkpoint.config import read_json
from checkpoint.reader import Checkpoint, Weights
from console import progress, run
from model import RMSNorm, Transformer, generate, load, move
from text.tokenizer import load_tokenizer
from text.wikitext import evaluation_text


def windows_of(ids: Tensor, window: int, limit: int | None = None) -> Tensor:
    """Token ids (tokens,) cut into windows (N, window) without overlap, tail dropped; the first `limit` of them."""
    n = len(ids) // window
    if n == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {window}; give a longer text or a "
                         "smaller --window")
    return ids[:n * window].view(n, window)[:limit]


def window_losses(logits_of, states: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token loss of each window, (B,) float32, from final states (B, T, C) and token ids (B, T).

    logits_of maps states to logits. A vocabulary is large: logits exist for at most 1024 tokens at a time.
    """
    losses = []
    for window, ids in zip(states, tokens, strict=True):
        parts = [F.cross_entropy(logits_of(part).float(), targets, reduction="sum")
                 for part, targets in zip(window[:-1].split(1024), ids[1:].split(1024), strict=True)]
        losses.append(torch.stack(parts).sum() / (len(ids) - 1))
    return torch.stack(losses)


@torch.inference_mode()
def losses(net: Transformer, windows: Tensor, device: str) -> Tensor:
    """Mean loss of each window (N, T) -> (N,), with the whole model in memory."""
    found, parts = [], list(batches(windows))
    for rows in progress(parts, "evaluate: batches", len(parts)):
        ids = windows[rows].to(device)
        found.append(window_losses(net.head, net.hidden(ids), ids).cpu())
    return torch.cat(found)


@torch.inference_mode()
def losses_streamed(source: Checkpoint, windows: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """The same numbers with one block in memory at a time: all windows pass through a block before the next is read."""
    runner, outer = Runner(source, windows.shape[1], device, dtype), source.outer()
    xs = embed(outer, windows, dtype)
    L = source.config.num_hidden_layers
    for i in progress(range(L), "evaluate: blocks", L):
        runner.run_block(source.block(i), xs)
    return final_losses(outer, xs, windows, runner)


def readout(outer: Weights, runner: Runner):
    """The function from streams (..., C) that leave the last block to logits (..., V)."""
    outer = move(outer, runner.device, runner.dtype)
    norm = RMSNorm(outer["model.norm.weight"], runner.config.rms_norm_eps)
    head = outer.get("lm_head.weight", outer["model.embed_tokens.weight"])
    return lambda states: F.linear(norm(states), head)


@torch.inference_mode()
def final_losses(outer: Weights, xs: Tensor, windows: Tensor, runner: Runner) -> Tensor:
    """Mean loss of each window (N, T) -> (N,), from the streams xs (N, T, C) that leave the last block."""
    logits_of = readout(outer, runner)
    return torch.cat([window_losses(logits_of, xs[rows].to(runner.device), windows[rows].to(runner.device)).cpu()
                      for rows in batches(windows)])


@dataclass
class Score:
    """A model's perplexity, and how it was measured."""
    perplexity: float
    tokens: int      # of the text
    windows: int
    seconds: float


def perplexity(path: str | Path, text: str, window: int = 2048, limit: int | None = None, device: str = "cpu",
               dtype: torch.dtype | None = None, stream: bool = False) -> Score:
    """Perplexity of a checkpoint on a text by the protocol above. ValueError if it is not finite."""
    source = Checkpoint(path)
    ids = torch.tensor(load_tokenizer(path).encode(text))
    windows = windows_of(ids, window, limit)
    dtype = dtype or source.dtype
    net = None if stream else load(path, device, dtype)
    start = time.monotonic()
    found = losses_streamed(source, windows, device, dtype) if stream else losses(net, windows, device)
    seconds, result = time.monotonic() - start, found.double().mean().exp()
    check_finite({"the perplexity": result}, str(path))
    return Score(float(result), len(ids), len(windows), seconds)


def sample(path: str | Path, prompt: str, device: str, dtype: torch.dtype, tokens: int = 60) -> str:
    """The prompt and its greedy continuation."""
    tokenizer, stop = load_tokenizer(path), ()
    for name in ("config.json", "generation_config.json"):
        if (Path(path) / name).is_file():
            eos = read_json(Path(path) / name).get("eos_token_id")
            stop = tuple(i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int and 0 <= i < 2**31) or stop
    ids = torch.tensor([tokenizer.encode(prompt)], device=device)
    return tokenizer.decode(generate(load(path, device, dtype), ids, tokens, stop=stop)[0].tolist())


def compare(paths: list[str | Path], text: str, name: str, window: int = 2048, limit: int | None = None,
            device: str = "cpu", dtype: str | None = None, stream: bool = False, prompt: str | None = None) -> None:
    """Print the protocol and a table, one row a checkpoint, and then a sample of each if there is a prompt."""
    sources = [Checkpoint(path) for path in paths]
    rows, dtypes = [], [compute_dtype(dtype, device, source.dtype) for source in sources]
    for source, kind in zip(sources, dtypes, strict=True):
        score = perplexity(source.path, text, window, limit, device, kind, stream)
        parameters, size = source.size()
        rows.append(f"| {source.name} | {parameters:,} | {source.config.num_hidden_layers} | "
                    f"{size / 1e6:,.1f} MB | {score.perplexity:.4f} | {score.windows * window / score.seconds:,.0f} |")
        context = source.config.max_position_embeddings
        if context and window > context:
            rows.append(f"({source.name} was made for at most {context} tokens: --window {context})")
        subset = f", SUBSET: the first {score.windows} windows only" if limit else ""
        rows.append(f"({name}: {score.tokens} tokens, {score.windows} windows of {window}{subset})")
    print(f"\nperplexity: windows of {window} tokens, no overlap, tail dropped, tokenizer's own BOS at the start of the text"
          f", loss in float32, model in {', '.join(dict.fromkeys(str(kind).removeprefix('torch.') for kind in dtypes))}")
    print("| checkpoint | parameters | blocks | size | perplexity | tokens/s |\n|---|---|---|---|---|---|")
    notes = [line for line in rows if not line.startswith("|")]
    print("\n".join([line for line in rows if line.startswith("|")] + list(dict.fromkeys(notes))))
    for source, kind in zip(sources, dtypes, strict=True):
        if prompt:
            print(f"\n{source.name}: {sample(source.path, prompt, device, kind)}")


def main() -> None:
    parser = console.parser("Measure the perplexity of checkpoints.", __doc__)
    parser.add_argument("--ckpt", required=True, nargs="+", help="one or more checkpoint folders")
    parser.add_argument("--data", help="a folder with wiki.test.raw, the WikiText-2 zip, any text file, or 'python' for "
                                       "Python's own library (default: WikiText-2, downloaded once); for --tasks the "
                                       "folder with their files")
    parser.add_argument("--tasks", help="zero-shot accuracy instead of perplexity: names with commas between, of piqa, "
                                        "winogrande, hellaswag, arc_easy, arc_challenge, openbookqa, boolq")
    parser.add_argument("--limit", type=int, help="only so many questions of each task: quicker, and not the field's number")
    parser.add_argument("--bos", choices=("own", "never"),
                        help="BOS in front of each question: the tokenizer's own habit (default, as "
                             "lm-evaluation-harness since autumn 2025), or never, as before")
    parser.add_argument("--window", type=int, default=2048, help="tokens in a window (default 2048)")
    parser.add_argument("--max-windows", type=int, help="only so many windows: quicker, and not the field's number")
    parser.add_argument("--stream", action="store_true", help="one block in memory at a time; the same numbers")
    parser.add_argument("--prompt", help="also continue this text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in (default: as stored on a GPU, float32 on a CPU)")
    args = parser.parse_args()
    if args.window < 2 or (args.max_windows is not None and args.max_windows < 1):
        raise ValueError("--window must be at least 2, and --max-windows at least 1")
    if args.prompt:
        args.prompt.encode("utf-8")  # a ValueError now rather than a crash inside a tokenizer
    for path in args.ckpt:
        Checkpoint(path)  # all of them, before the first takes its time
    if args.limit is not None and args.tasks is None:
        raise ValueError("--limit is for --tasks; --max-windows shortens the measurement of perplexity")
    if args.bos is not None and args.tasks is None:
        raise ValueError("--bos is for --tasks; a text's perplexity begins with the tokenizer's own BOS")
    if args.tasks is not None:
        if args.prompt or args.max_windows or args.stream or args.window != 2048:
            raise ValueError("--tasks measures accuracy; --prompt, --max-windows, --stream and --window are for perplexity")
        from zeroshot.score import zero_shot  # here, because it calls this file's functions
        return zero_shot(args.ckpt, args.tasks, args.data, args.limit, args.device, args.dtype,
                         args.bos or "own")
    compare(args.ckpt, *evaluation_text(args.data), args.window, args.max_windows, args.device, args.dtype, args.stream,
            args.prompt)


if __name__ == "__main__":
    run(main)
