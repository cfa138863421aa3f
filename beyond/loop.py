"""Run blocks more than once: the opposite of making them fewer.

After the published description of RecursiveVLM (arXiv 2602.09080), on text alone; not a
reproduction, for its code and data are not public. Equations and tables: docs/looping.md.

Without training, a damped loop runs a window of blocks several times:

    python -m beyond.loop --ckpt PATH --window 11-12 8-15 --times 1 2 3 4 [--undamped]

With training, all blocks run several times. A further pass starts from the embedding plus what
connectors make of the streams of the pass before. The blocks stay, or get a LoRA (--lora):

    python -m beyond.loop --ckpt PATH --passes 2                    train, judge, save
    python -m beyond.loop --ckpt PATH --passes 3 --load FOLDER      judge what was saved

Controls: --beta 1, --no-connector, and plain training: --passes 1 --lora, with twice the --steps.
"""
import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import console
from beyond.lora import add_lora
from beyond.recover import draw, read_lesson, split, train
from beyond.recursion import Connector, judged, lesson, monotonic_loss, restore, save
from checkpoint.reader import Checkpoint, Weights
from console.options import add_device_options, compute_dtype
from evaluate import losses, windows_of
from model import Transformer, check_finite, check_ids, load, rope_table
from text.tokenizer import load_tokenizer
from text.wikitext import held_out_text

COUNTS = {"steps": 500, "batch": 16, "length": 256, "seed": 0}
RECORDED = ("passes", "beta", "lora", "no_connector", *COUNTS, "rate", "data")


# ---- without training: a loop over a window of blocks

def loop(g: Callable[[Tensor], Tensor], x: Tensor, times: int, damped: bool = True) -> Tensor:
    """Return x after K = `times` steps x <- (1 - 1/K) x + (1/K) g(x); x <- g(x) if not damped."""
    share = 1 / times if damped else 1.0
    for _ in range(times):
        x = (1 - share) * x + share * g(x)  # exactly g(x) for a share of 1
    return x


def looped(net: Transformer, ids: Tensor, window: tuple[int, int], times: int,
           damped: bool = True) -> Tensor:
    """Return the final normed states (B, T, C) of ids (B, T) if blocks first..last loop."""
    x, (first, last) = net.model["embed_tokens"](ids), window
    rope, blocks = rope_table(net.config, 0, ids.shape[1], like=x), net.model["layers"]

    def through(start: int, stop: int, x: Tensor) -> Tensor:
        for block in blocks[start:stop]:
            x = block(x, rope)
        return x
    x = loop(partial(through, first, last + 1), through(0, first, x), times, damped)
    return net.model["norm"](through(last + 1, len(blocks), x))


# ---- the command

def window_of(word: str) -> tuple[int, int]:
    """Read a window a-b, both blocks included."""
    first, _, last = word.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{word!r}: expected first-last, as in 8-11")
    return int(first), int(last)


def parse_args() -> argparse.Namespace:
    parser = console.parser("Run blocks more than once.", __doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="the dense model")
    add("--data", nargs="+", help="plain texts as for flatten.py; the first's held-out part judges")
    add("--max-windows", type=int, help="judge on at most this many windows")
    add("--window", nargs="+", type=window_of, metavar="A-B", help="first and last block to loop")
    add("--times", nargs="+", type=int, default=[1, 2, 3, 4], help="how often (default 1 2 3 4)")
    add("--undamped", action="store_true", help="loop without damping")
    add("--passes", type=int, help="train, so that all blocks run this often")
    add("--beta", type=float, default=1.5, help="weight of a token made worse (default 1.5)")
    add("--lora", action="store_true", help="train a LoRA, too")
    add("--no-connector", action="store_true", help="start a pass from the end of the one before")
    for name, value in COUNTS.items():
        add(f"--{name}", type=int, default=value, help="default %(default)s")
    add("--rate", type=float, default=1e-3, help="largest learning rate (default %(default)s)")
    add("--load", type=Path, help="judge this trained loop, train nothing")
    add("--out", type=Path, help="result (default: out/NAME-loop)")
    add_device_options(parser)
    args = parser.parse_args()
    if bool(args.window) == (args.passes is not None):
        raise ValueError("give --window to loop some blocks, or --passes to run all; one of them")
    counts = *args.times, args.steps, args.batch, args.passes, args.max_windows
    if min(n for n in counts if n is not None) < 1 or args.length < 2:
        raise ValueError("--length must be at least 2, and all other counts at least 1")
    if not (1 <= args.beta < math.inf and 0 < args.rate < math.inf and 0 <= args.seed < 2**31):
        raise ValueError("--beta must be at least 1, --rate positive, --seed from 0 to 2^31")
    if any(path.endswith(".json") for path in args.data or []):
        raise ValueError("--data: a loop learns from plain text, not from JSON")
    return args


def tell_windows(net: Transformer, windows: Tensor, args: argparse.Namespace) -> None:
    """Print a table of perplexities: a row for each window of blocks, a column for each K."""
    print(f"| blocks{', undamped' if args.undamped else ''} | "
          f"{' | '.join(f'K = {K}' for K in args.times)} |\n|---{'|---' * len(args.times)}|")
    for first, last in args.window:
        row = f"| {first}-{last} |"
        for K in args.times:
            hidden = partial(looped, net, window=(first, last), times=K, damped=not args.undamped)
            model = SimpleNamespace(head=net.head, hidden=hidden)
            row += f" {losses(model, windows, args.device).double().mean().exp():.4f} |"
        print(row, flush=True)


def parts_of(net: Transformer, args: argparse.Namespace) -> tuple[Connector | None, Weights]:
    """Return the connector, if wanted, and all that is trained, by name. ValueError if nothing."""
    connector = None if args.no_connector or args.passes == 1 else Connector(net)
    if args.lora:
        add_lora(net, args.seed)
    parts = {name: p for name, p in net.named_parameters() if p.requires_grad}
    parts |= {f"connector.{n}": p for n, p in connector.named_parameters()} if connector else {}
    if not parts:
        raise ValueError("nothing to train: connectors serve the second pass and later ones; give "
                         "--lora, or --passes 2 without --no-connector")
    return connector, parts


def learn(net: Transformer, connector: Connector | None, parts: Weights, texts: list,
          args: argparse.Namespace) -> dict:
    """Train the parts on texts (tokens,) each, of which the last twentieths judge. Returns facts.

    A block pass is one token through one block once, in training.
    """
    texts, held_out = zip(*map(split, texts), strict=True)
    held_out = draw(held_out, args.batch, args.length, 0)[0]
    facts = {"steps": 0, "tokens": 0, "seconds": 0.0, "held_out": []}
    teach = partial(lesson, net, connector, args.passes, partial(monotonic_loss, beta=args.beta))
    train(teach, lambda: float(judged(net, connector, args.passes, held_out, args.device)[0, -1]),
          texts, torch.optim.AdamW(parts.values(), betas=(0.9, 0.95), weight_decay=0.0), facts,
          lambda: None, args)
    return facts | {"block_passes": facts["tokens"] * args.passes * len(net.model["layers"])}


def main() -> None:
    args = parse_args()
    source = Checkpoint(args.ckpt)
    out = args.out or Path("out") / f"{source.name}-loop"
    if args.passes and not args.load and out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    if args.load and not (args.load / "loop.json").is_file():
        raise ValueError(f"--load {args.load}: expected a folder with loop.json")
    if args.passes and not args.load:
        out.parent.mkdir(parents=True, exist_ok=True)  # an OSError now, and not after the work
    L, last = source.config.num_hidden_layers, max([b for _, b in args.window or []], default=0)
    if last >= L:
        raise ValueError(f"--window: there is no block {last}; the model has blocks 0 to {L - 1}")
    dtype = compute_dtype(args.dtype, args.device, source.dtype)
    tokenizer, (text, name) = load_tokenizer(source.path), held_out_text(args.data)
    windows = windows_of(torch.tensor(tokenizer.encode(text)), args.length, args.max_windows)
    check_ids(windows, source.config.vocab_size)
    net = load(source.path, args.device, dtype)
    print(f"judged on {len(windows)} windows of {args.length} tokens of {name}")
    if args.window:
        tell_windows(net, windows, args)
        return
    connector, parts = parts_of(net, args)
    with torch.autocast(torch.device(args.device).type, torch.bfloat16,  # see beyond/recover.py
                        enabled=dtype != torch.float32, cache_enabled=False):
        if args.load:
            restore(args.load, source, parts)
        else:
            texts = [read_lesson(path, tokenizer, (), args.length)[0]
                     for path in args.data or [None]]
            facts = learn(net, connector, parts, texts, args)
        scores = judged(net, connector, args.passes, windows, args.device)
    check_finite({"the loss": scores}, "loop")
    print("| pass | perplexity | tokens that improved at every pass |\n|---|---|---|")
    for r, (loss, share) in enumerate(scores.T.tolist(), 1):
        print(f"| {r} | {math.exp(loss):.4f} | {share:.1%} |")
    if not args.load:
        save(out, parts, {name: getattr(args, name) for name in RECORDED} | facts | {
            "source": str(source.path), "source_sha256": source.digest(), "judged_on": name,
            "windows": len(windows), "losses": scores[0].tolist(), "improved": scores[1].tolist()})
        print(f"wrote {out}: {facts['steps']} steps, {facts['block_passes']:,} block passes of a "
              f"token, {facts['seconds']:.0f} s; no ordinary checkpoint")


if __name__ == "__main__":
    console.run(main)
