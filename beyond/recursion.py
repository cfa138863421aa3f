"""A model that runs all its blocks several times, with connectors from a pass to the next.

After the published description of RecursiveVLM (arXiv 2602.09080), on text alone.

    E_1     = embedding                            H_l,r: the stream after l blocks in pass r
    E_(r+1) = E_1 + sum over l of gamma_l * (rms(H_l,r) W_l)        l: a quarter, half, ... of all
    loss    = sum over r of mean over tokens of w_r CE_r            CE_r: -log p(token) after pass r
    w_r     = beta if CE_r > CE_(r-1), else 1                       no gradient through w

gamma starts at zero and W at the identity. So before training every pass is the dense model's.
"""
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beyond.lessons import in_pieces
from beyond.recover import micro_batches
from checkpoint.beside import write_json
from checkpoint.config import read_json
from checkpoint.reader import Checkpoint, Weights
from checkpoint.writer import publish
from model import Transformer, rope_table, sum_dtype


class Connector(nn.Module):
    """Make a pass's start of the pass before: E + sum over places l of gamma_l * (rms(H_l) W_l).

    E is the embedding, and H_l the stream after l blocks, each (B, T, C). W_l starts at the
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
        parts, added = zip(self.gamma, self.W, streams, strict=True), 0.0
        for gamma, W, H in parts:  # a weight of the norm would be part of W
            added += gamma * (F.rms_norm(H.to(W.dtype), H.shape[-1:], eps=self.eps) @ W)
        return embedding + added.to(embedding.dtype)


def recursion(net: Transformer, connector: Connector | None, ids: Tensor,
              passes: int) -> list[Tensor]:
    """Return the stream (B, T, C) that leaves the last block, of each pass over ids (B, T).

    Without a connector a pass starts from the end of the one before.
    """
    x = embedding = net.model["embed_tokens"](ids)
    rope, ends = rope_table(net.config, 0, ids.shape[1], like=x), []
    while True:
        streams = []
        for block in net.model["layers"]:
            x = block(x, rope)
            streams.append(x)
        ends.append(x)
        if len(ends) == passes:
            return ends
        if connector:
            x = connector(embedding, [streams[l - 1] for l in connector.places])


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) for each token and pass, (n, R), for logits (n, R, V), targets (n,)."""
    logs = logits.to(sum_dtype(logits.dtype)).log_softmax(-1)
    return -logs.gather(-1, targets[:, None, None].expand(-1, logs.shape[1], 1))[..., 0]


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


def lesson(net: Transformer, connector: Connector | None, passes: int,
           summary: Callable[[Tensor], Tensor], ids: Tensor, learned: Tensor,
           done: float = 0.0) -> Tensor:
    """Return the mean over tokens of a `summary` of the losses (n, R), e.g. monotonic_loss.

    Of ids (B, T) the tokens in `learned` (B, T) are predicted. `done` is what `train` says.
    """
    predicting = learned[:, 1:]
    states = [x[:, :-1][predicting] for x in recursion(net, connector, ids, passes)]
    return in_pieces(lambda x, y: summary(token_losses(net.head(net.model["norm"](x)), y)),
                     torch.stack(states, 1), ids[:, 1:][predicting])


@torch.no_grad()
def judged(net: Transformer, connector: Connector | None, passes: int, windows: Tensor,
           device: str) -> Tensor:
    """Return the mean loss of each pass, and the share `improved`, of windows (N, T), (2, R)."""
    def both(losses: Tensor) -> Tensor:
        return torch.stack([losses.double().mean(0), improved(losses)])
    whole = windows, torch.ones_like(windows, dtype=torch.bool)
    return sum(share * lesson(net, connector, passes, both, ids, learned).cpu()
               for ids, learned, share in micro_batches(whole, device))


# ---- the folder of a trained model


def save(out: Path, parts: Weights, record: dict) -> None:
    """Write loop.safetensors and loop.json into the new folder `out`, both or nothing."""
    folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        save_file({name: p.detach() for name, p in parts.items()}, folder / "loop.safetensors")
        write_json(folder / "loop.json", record)
        publish(folder, out, overwrite=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def restore(folder: Path, source: Checkpoint, parts: Weights) -> None:
    """Put what was saved into the parts. ValueError if it is of another source, or other parts."""
    if read_json(folder / "loop.json").get("source_sha256") != source.digest():
        raise ValueError(f"{folder} was not trained on {source.path}: its loop.json names another "
                         "source_sha256; give the --ckpt that it names as source")
    try:
        saved = load_file(folder / "loop.safetensors")
        for name, p in parts.items():
            p.data.copy_(saved.pop(name))
        if saved:
            raise KeyError(min(saved))
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be read, or was trained with another --lora or "
                         f"--no-connector ({error})") from None
