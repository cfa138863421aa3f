"""Train a model to run all its blocks several times, with connectors from one pass to the next.

After the published description of RecursiveVLM (arXiv 2602.09080), on text alone; not a
reproduction, for its code and data are not public. Tables: docs/looping.md.

    E_1     = embedding                            H_l,r: the stream after l blocks in pass r
    E_(r+1) = E_1 + sum over l of gamma_l * (rms(H_l,r) W_l)        l: a quarter, half, ... of all
    loss    = sum over r of mean over tokens of w_r CE_r            CE_r: -log p(token) after pass r
    w_r     = beta if CE_r > CE_(r-1), else 1                       no gradient through w

gamma starts at zero and W at the identity, so before training every pass is the dense model's. The
blocks stay as they are, or get a LoRA. What is trained is saved, no ordinary checkpoint; the same
command again goes on from there, or judges it once more.

    python -m beyond.recursion --ckpt PATH [--lora]

Controls: --beta 1, --no-connector, and plain training: --passes 1 --lora, with twice the --steps.
"""
import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import console
from beyond import recover
from beyond.lessons import in_pieces, label_loss, streams
from beyond.lora import add_lora
from checkpoint.reader import Checkpoint
from console.options import add_device_options, compute_dtype
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
    targets, ends = ids[:, 1:].flatten(), recursion(net, connector, ids, passes)
    return torch.stack([in_pieces(lambda x, y: label_loss(net.head(net.model["norm"](x)), y),
                                  end[:, :-1].flatten(0, 1), targets) for end in ends], 1)


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


# ---- the command

def parse_args() -> argparse.Namespace:
    parser = console.parser("Train a model to run its blocks several times.", __doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="the dense model")
    add("--data", nargs="+", help="plain texts; the held-out part of the first judges")
    add("--max-windows", type=int, help="judge on at most this many windows")
    add("--passes", type=int, default=2, help="how often all blocks run (default 2)")
    add("--judge", type=int, help="judge this many passes (default: as many as are trained)")
    add("--beta", type=float, default=1.5, help="weight of a token made worse (default 1.5)")
    add("--lora", action="store_true", help="train a LoRA of all blocks, too")
    add("--no-connector", action="store_true", help="start a pass from the end of the one before")
    recover.add_training_options(parser)
    add("--rate", type=float, default=1e-3, help="largest learning rate (default %(default)s)")
    add("--out", type=Path, help="what is trained (default: out/NAME-loop.safetensors)")
    add("--rows", type=Path, help="append the result to this file as a JSON line")
    add_device_options(parser)
    args = parser.parse_args()
    recover.check_training(args)
    args.judge = args.passes if args.judge is None else args.judge
    if min(args.passes, args.judge, args.beta) < 1 or not math.isfinite(args.beta):
        raise ValueError("--passes, --judge and --beta must be at least 1")
    if not args.lora and (args.no_connector or args.passes == 1):
        raise ValueError("nothing to train: connectors serve the second pass and later ones; give "
                         "--lora, or --passes 2 without --no-connector")
    if any(path.endswith(".json") for path in args.data or []):
        raise ValueError("--data: a loop learns from plain text, not from JSON")
    return args


def main() -> None:
    args = parse_args()
    source = Checkpoint(args.ckpt)
    out = args.out or Path("out") / f"{source.name}-loop.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)  # an OSError now, and not after the work
    text, name = held_out_text(args.data)
    windows = windows_of(torch.tensor(load_tokenizer(source.path).encode(text)), args.length,
                         args.max_windows)
    texts, _, about = recover.read_lessons(args, source)
    run = {name: getattr(args, name) for name in OPTIONS} | about | {
        "source": str(source.path), "source_sha256": source.digest()}
    net = load(source.path, args.device, compute_dtype(args.dtype, args.device, source.dtype))
    connector = None if args.no_connector or args.passes == 1 else Connector(net)
    if args.lora:
        add_lora(net, args.seed)
    parts = nn.ModuleDict({"net": net, "connector": connector})
    trained = {name: p for name, p in parts.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.95), weight_decay=0.0)
    facts = (recover.read_state(out, run, trained, optimizer) if out.exists()
             else {"steps": 0, "tokens": 0, "seconds": 0.0})
    save = partial(recover.save_state, out, run, facts, trained, optimizer)

    def teach(ids: Tensor, learned: Tensor, done: float) -> Tensor:
        return monotonic_loss(token_losses(net, connector, args.passes, ids), args.beta)
    recover.train(teach, texts, optimizer, facts, save, args)
    save()
    print(f"{out}: {facts['steps']} steps, {facts['tokens']:,} tokens, {facts['seconds']:.0f} s; "
          f"no ordinary checkpoint\njudged on {len(windows)} windows of {args.length} tokens of "
          f"{name}\n| pass | perplexity | tokens that improved at every pass |\n|---|---|---|")
    losses, shares = judge(net, connector, args.judge, windows, args.device)
    for r, (loss, share) in enumerate(zip(losses, shares, strict=True), 1):
        print(f"| {r} | {math.exp(loss):.4f} | {share:.1%} |")
    if args.rows:
        row = run | facts | {"windows": len(windows), "losses": losses, "improved": shares}
        with open(args.rows, "a") as file:
            print(json.dumps(row), file=file)


if __name__ == "__main__":
    console.run(main)
