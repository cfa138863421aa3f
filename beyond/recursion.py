"""Train a model to run all its blocks several times, with connectors from one pass to the next.

After the published description of RecursiveVLM (arXiv 2602.09080), on text alone; not a
reproduction. Equations and tables: docs/looping.md. What is trained is saved, no ordinary
checkpoint; the same command again goes on from there, or judges it once more.

    python -m beyond.recursion --ckpt PATH [--lora]     trains connectors, and a LoRA of all blocks

Controls: --beta 1, --no-connector, and plain training: --passes 1 --lora, with twice the --steps.
"""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import console
from beyond import material, training
from beyond.lessons import label_losses, streams
from beyond.lora import add_lora
from checkpoint.reader import Checkpoint
from console.options import compute_dtype
from evaluate import windows_of
from model import Transformer, batches, check_finite, load, sum_dtype
from text.tokenizer import load_tokenizer
from text.wikitext import held_out_text

OPTIONS = ("passes", "beta", "lora", "no_connector", "steps", "batch", "length", "rate", "seed",
           "dtype", "device")


class Connector(nn.Module):
    """Make a pass's start of the pass before: E + sum over places l of gamma_l * (rms(H_l) W_l).

    E is the embedding (B, T, C), and H_l = streams[l] the stream after l blocks. W_l starts at the
    identity and gamma_l at zero, so a pass at first starts as the first one did.
    """

    def __init__(self, net: Transformer):
        super().__init__()
        table, L = net.model["embed_tokens"].weight, len(net.model["layers"])
        self.places = sorted({max(1, L * quarter // 4) for quarter in (1, 2, 3, 4)})
        eye = torch.eye(table.shape[1], dtype=sum_dtype(table.dtype), device=table.device)
        self.W = nn.Parameter(eye.repeat(len(self.places), 1, 1))           # (places, C, C)
        self.gamma = nn.Parameter(torch.zeros_like(self.W[:, 0]))           # (places, C)
        self.eps = net.config.rms_norm_eps

    def forward(self, embedding: Tensor, streams: list[Tensor]) -> Tensor:
        added = 0.0
        for gamma, W, l in zip(self.gamma, self.W, self.places, strict=True):
            H = streams[l].to(W.dtype)  # a weight of the norm would be part of W
            added += gamma * (F.rms_norm(H, H.shape[-1:], eps=self.eps) @ W)
        return embedding + added.to(embedding.dtype)


def recursion(net: Transformer, connector: Connector | None, ids: Tensor,
              passes: int) -> list[Tensor]:
    """Return the stream (B, T, C) that leaves the last block, of each pass over ids (B, T).

    Without a connector a pass starts from the end of the one before.
    """
    embedding = start = net.model["embed_tokens"](ids)
    ends = []
    for _ in range(passes):
        xs = streams(net, start)
        ends.append(xs[-1])
        start = connector(embedding, xs) if connector else xs[-1]
    return ends


def token_losses(net: Transformer, connector: Connector | None, passes: int,
                 ids: Tensor) -> Tensor:
    """Return -log p(token) after each pass, (n, R), of all tokens of ids (B, T) but the first."""
    targets = ids[:, 1:].flatten()
    return torch.stack([label_losses(net, end[:, :-1].flatten(0, 1), targets)
                        for end in recursion(net, connector, ids, passes)], 1)


def monotonic_loss(losses: Tensor, beta: float) -> Tensor:
    """Return the sum over passes of the mean weighted loss, for losses (n, R).

    The weight is beta where a pass made a token worse than the pass before, else 1. No gradient
    flows through the comparison.
    """
    worse = F.pad(losses[:, 1:] > losses[:, :-1], (1, 0))                   # (n, R)
    return torch.where(worse, beta * losses, losses).mean(0).sum()


def improved(losses: Tensor) -> Tensor:
    """Return the share of tokens that improved at every pass up to each, (R,), of losses (n, R)."""
    better = F.pad(losses[:, 1:] < losses[:, :-1], (1, 0), value=True)
    return better.cumprod(1).double().mean(0)


@torch.no_grad()
def judge(net: Transformer, connector: Connector | None, passes: int, windows: Tensor,
          device: str) -> tuple[list[float], list[float]]:
    """Return the mean loss of each pass over windows (N, T), and the share `improved`."""
    losses = torch.cat([token_losses(net, connector, passes, windows[rows].to(device)).cpu()
                        for rows in batches(windows)]).double()
    check_finite({"the losses": losses}, "loop")
    return losses.mean(0).tolist(), improved(losses).tolist()


def main() -> None:
    parser = console.parser("Train a model to run its blocks several times.", __doc__)
    add = parser.add_argument
    add("--max-windows", type=int, help="judge on at most this many windows")
    add("--passes", type=int, default=2, help="how often all blocks run (default 2)")
    add("--judge", type=int, help="judge this many passes (default: as many as are trained)")
    add("--beta", type=float, default=1.5, help="weight of a token made worse (default 1.5)")
    add("--lora", action="store_true", help="train a LoRA of all blocks, too")
    add("--no-connector", action="store_true", help="start a pass from the end of the one before")
    add("--rows", type=Path, help="append the result to this file as a JSON line")
    args = training.training_args(parser, 1e-3)
    args.judge = args.passes if args.judge is None else args.judge
    if min(args.passes, args.judge, args.beta) < 1 or not math.isfinite(args.beta):
        raise ValueError("--passes, --judge and --beta must be at least 1, and --beta finite")
    if not args.lora and (args.no_connector or args.passes == 1):
        raise ValueError("nothing to train: give --lora, or --passes 2 without --no-connector")
    if any(map(material.is_json, args.data or [])):
        raise ValueError("--data: a loop learns from plain text, not from JSON")
    source = Checkpoint(args.ckpt)
    out = args.out or Path("out") / f"{source.name}-loop.safetensors"
    if args.rows and (args.rows.is_dir() or args.rows.resolve() == out.resolve()):
        raise ValueError(f"--rows {args.rows} is a folder or the output; name another file")
    text, name = held_out_text(args.data)
    windows = windows_of(load_tokenizer(source.path).encode(text), args.length, args.max_windows)
    texts, _, about = material.read_lessons(args, source)
    run = {name: getattr(args, name) for name in OPTIONS} | about | {
        "source_sha256": source.digest()}
    training.read_state(out, run, {})  # a wrong --out is told before the model is loaded
    net = load(source.path, args.device, compute_dtype(args.dtype, args.device, source.dtype))
    connector = None if args.no_connector or args.passes == 1 else Connector(net)
    if args.lora:
        add_lora(net, args.seed)
    parts = nn.ModuleDict({"net": net, "connector": connector})

    def teach(ids: Tensor, learned: Tensor, done: float) -> Tensor:
        return monotonic_loss(token_losses(net, connector, args.passes, ids), args.beta)
    with training.alone(out, "the same command goes on there"):
        facts = training.train(teach, parts, texts, out, run, {}, args)
    print(f"{out}: {facts['steps']} steps, {facts['tokens']:,} tokens, {facts['seconds']:.0f} s; "
          f"no ordinary checkpoint\njudged on {len(windows)} windows of {args.length} tokens of "
          f"{name}\n| pass | perplexity | tokens that improved at every pass |\n|---|---|---|")
    losses, shares = judge(net, connector, args.judge, windows, args.device)
    for r, (loss, share) in enumerate(zip(losses, shares, strict=True), 1):
        print(f"| {r} | {math.exp(loss):.4f} | {share:.1%} |")
    if args.rows:
        result = {"windows": len(windows), "losses": losses, "improved": shares}
        args.rows.parent.mkdir(parents=True, exist_ok=True)
        with open(args.rows, "a") as file:
            print(json.dumps({"source": args.ckpt} | run | facts | result), file=file)


if __name__ == "__main__":
    console.run(main)
