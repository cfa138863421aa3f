"""Run calibration text through a model block by block, and add up what flattening and pruning need to know.

Two facts decide whether a model can be flattened. How alike are the inputs of its blocks? That is the matrix S,

    S[i, j] = mean over tokens of cos( x_i[t], x_j[t] ),     x_i the residual stream that enters block i,

and S close to 1 between neighbours means that they may as well read the same input. And why are they alike? Because the
stream grows with depth (its variance is printed for every block) while what a block adds does not keep up (so are the
norms of the attention and MLP outputs relative to the stream they are added to).

    python calibrate.py --ckpt PATH            prints both for a model and saves S as an .npy file
"""
import argparse
import hashlib
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import console
from checkpoint.reader import Checkpoint, Weights
from console import command, progress, run
from model import Block, check_ids, move, rope_table
from text.tokenizer import load_tokenizer
from text.wikitext import calibration_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH_TOKENS = 2048  # tokens a block reads at a time


def calibration_tokens(ids: Tensor, n: int, length: int, seed: int) -> Tensor:
    """n windows (n, length) from random places of the token ids (tokens,), the same ones for the same seed.

    ValueError if the text has fewer than n * length tokens: windows would mostly repeat each other.
    """
    if len(ids) < length:
        raise ValueError(f"the calibration text has {len(ids)} tokens, fewer than one window of --length {length}; give a "
                         "longer text or a smaller --length")
    if len(ids) < n * length:
        raise ValueError(f"the calibration text has {len(ids)} tokens, and --samples {n} of --length {length} ask for "
                         f"{n * length}; give a longer text, or --samples {max(1, len(ids) // length)}")
    starts = torch.randint(len(ids) - length + 1, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start:start + length] for start in starts.tolist()])


def batches(xs: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of xs (N, T, ...) that hold about BATCH_TOKENS tokens each."""
    step = max(1, BATCH_TOKENS // xs.shape[1])
    return (slice(i, i + step) for i in range(0, len(xs), step))


def embed(outer: Weights, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The stream (N, T, C) that enters the first block, on the CPU, for token ids (N, T)."""
    table = outer["model.embed_tokens.weight"]
    check_ids(tokens, len(table))
    return F.embedding(tokens, table).to(dtype)


class Runner:
    """Runs blocks over streams (N, T, C) kept on the CPU: moves weights and batches to the device, and back.

    Blocks come and go one at a time, so memory does not grow with depth.
    """

    def __init__(self, source: Checkpoint, length: int, device: str, dtype: torch.dtype):
        self.config, self.device, self.dtype = source.config, torch.device(device), dtype
        self.rope = rope_table(source.config, 0, length, like=torch.empty(0, device=device, dtype=dtype))

    def block(self, weights: Weights) -> Block:
        """A block ready to run."""
        return Block(move(weights, self.device, self.dtype), self.config)

    @torch.inference_mode()
    def update(self, xs: Tensor, step) -> None:
        """xs <- step(xs), in place and batch by batch; step maps a batch (B, T, C) on the device to one like it."""
        for rows in batches(xs):
            xs[rows] = step(xs[rows].to(self.device)).to(xs.device)

    def run_block(self, weights: Weights, xs: Tensor) -> None:
        """xs <- block(xs), in place."""
        block = self.block(weights)
        self.update(xs, lambda x: block(x, self.rope))

    def attend(self, weights: Weights, xs: Tensor) -> None:
        """xs <- xs + the block's attention, in place."""
        block = self.block(weights)
        self.update(xs, lambda x: x + block.attend(x, self.rope))

    def feed(self, weights: Weights, xs: Tensor) -> None:
        """xs <- xs + the block's MLP, in place."""
        block = self.block(weights)
        self.update(xs, lambda x: x + block.feed(x))

    @torch.inference_mode()
    def head_sums(self, block: Block, xs: Tensor) -> Tensor:
        """Sum over tokens of |what each channel of each head hands to o_proj|, (H*D,): the statistic of head_importance."""
        total = 0
        for rows in batches(xs):
            heads = block.self_attn.heads(block.input_layernorm(xs[rows].to(self.device)), self.rope)
            total = total + heads.abs().flatten(0, -2).sum(0, dtype=sum_dtype(self.dtype))
        return total

    @torch.inference_mode()
    def mlp_gram(self, block: Block, xs: Tensor) -> Tensor:
        """Sum over tokens of psi psi^T, (F, F): the statistic of ridge_leverage and nystrom_down.

        psi is what the MLP's channels hand to down_proj (after the gate), for streams xs that have passed attention.
        """
        width = block.mlp.down_proj.in_features
        gram = torch.zeros(width, width, dtype=sum_dtype(self.dtype), device=self.device)
        for rows in batches(xs):
            psi = block.mlp.channels(block.post_attention_layernorm(xs[rows].to(self.device))).flatten(0, 1)
            add_gram(gram, psi.to(gram.dtype))
        return gram.tril_() + gram.tril(-1).T


def add_gram(total: Tensor, a: Tensor) -> None:
    """total (n, n) += a^T a, for a (tokens, n), in place, up to the diagonal at least: four strips do 5/8 of the work."""
    strip = -(-len(total) // 4)
    for i in range(0, len(total), strip):
        total[i:i + strip, :i + strip].addmm_(a[:, i:i + strip].T, a[:, :i + strip])


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over tokens are kept in float32 at least."""
    return torch.promote_types(dtype, torch.float32)


@dataclass
class Measurement:
    """What one pass tells about a model of L blocks. Row i of `similarity` (L+1, L+1) is the stream that enters block i,
    the last row the stream that leaves the last block; the rest is one number a block, a mean over tokens."""
    similarity: Tensor
    variance: Tensor    # of the stream's channels
    attention: Tensor   # |attention output| / |stream it is added to|
    mlp: Tensor         # |MLP output| / |stream it is added to|

    @property
    def S(self) -> Tensor:
        """(L, L): cosine similarity of the blocks' inputs."""
        return self.similarity[:-1, :-1]


def cosine_sums(states: list[Tensor]) -> Tensor:
    """Sum over tokens of the cosine of every pair of streams: n tensors (..., C) -> (n, n), float32 or better."""
    flat = [x.flatten(0, -2) for x in states]                                          # (tokens, C)
    step = max(1, 2**22 // (len(flat) * flat[0].shape[1]))                             # tokens at a time: little memory
    total = 0
    for t in range(0, len(flat[0]), step):
        unit = torch.stack([F.normalize(x[t:t + step].to(sum_dtype(x.dtype)), dim=-1).flatten() for x in flat])
        total = total + unit @ unit.T                                                  # dot over tokens and channels
    return total


@torch.inference_mode()
def measure(source: Checkpoint, tokens: Tensor, runner: Runner) -> Measurement:
    """One pass of the tokens (N, T) through all L blocks. ValueError names a block that holds or makes NaN or infinity.

    S compares all blocks on the same token, so a few windows at a time pass through the whole depth: so few that their
    L + 1 streams together take no more memory than one stream of all N windows, for N > L. The price is that every block
    is read once for each such slice, from the page cache if the checkpoint fits there.
    """
    L, outer = source.config.num_hidden_layers, source.outer()
    check_finite(outer, "outside the blocks")
    step = max(1, len(tokens) // (L + 1))
    similarity, sums = torch.zeros(L + 1, L + 1, dtype=torch.float64), torch.zeros(3, L, dtype=torch.float64)
    starts = range(0, len(tokens), step)
    for start, i in progress(product(starts, range(L)), "measure: blocks x batches", len(starts) * L):
        weights = source.block(i)
        if start == 0:
            check_finite(weights, f"block {i}")
        if i == 0:
            states = [embed(outer, tokens[start:start + step], runner.dtype)]
        block, x = runner.block(weights), states[-1]
        y = torch.empty_like(x)
        for rows in batches(x):
            y[rows], observed = observe(block, x[rows].to(runner.device), runner.rope)
            sums[:, i] += observed.cpu()
        check_finite({"its output": y}, f"block {i}")
        states.append(y)
        if i == L - 1:
            for rows in batches(x):
                similarity += cosine_sums([state[rows].to(runner.device) for state in states]).cpu()
    return Measurement(similarity / tokens.numel(), *sums / tokens.numel())


def observe(block: Block, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(block output, three sums over tokens): the stream's variance, and the relative norms of attention and MLP."""
    attention = block.attend(x, rope)
    middle = x + attention
    mlp = block.feed(middle)
    wide = sum_dtype(x.dtype)
    share = [(part.to(wide).norm(dim=-1) / base.to(wide).norm(dim=-1).clamp_min(1e-30)).sum()
             for part, base in ((attention, x), (mlp, middle))]
    return middle + mlp, torch.stack([x.to(wide).var(-1, correction=0).sum(), *share])


def check_finite(tensors: Weights, where: str) -> None:
    """ValueError with the place if any number is NaN or infinite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: NaN or infinity in {name}; the checkpoint is broken, or --dtype is too narrow for "
                             "this model (try float32)")


def read_tokens(ckpt: Path, args: argparse.Namespace) -> tuple[Tensor, str]:
    """(calibration windows (samples, length), what text they are from), by the checkpoint's own tokenizer."""
    text, name = calibration_text(args.data)
    ids = torch.tensor(load_tokenizer(ckpt).encode(text))
    return calibration_tokens(ids, args.samples, args.length, args.seed), name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that flatten.py, prune.py and calibrate.py share; None stands for the default that `defaults` fills in."""
    parser.add_argument("--data", help="calibration text: a folder with wiki.*.raw, a .raw/.txt file, the WikiText-2 zip, "
                                       "or 'python' for Python's own library (default: WikiText-2, downloaded once)")
    parser.add_argument("--samples", type=int, help="windows of calibration text (default 128)")
    parser.add_argument("--length", type=int, help="tokens in a window (default 2048)")
    parser.add_argument("--seed", type=int, help="which windows (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in (default: as stored on a GPU, float32 on a CPU)")


def describe_run(script: str, args: argparse.Namespace, tokens: Tensor, text: str, runner: Runner, **flags) -> dict:
    """What flatten.json records so that a run can be repeated: settings, calibration text, versions, the command."""
    names = ("samples", "length", "seed", "ridge", "max_group", "data")
    settings = {name: getattr(args, name) for name in names if hasattr(args, name)}
    settings["dtype"] = str(runner.dtype).removeprefix("torch.")
    options = {name.replace("_", "-"): value for name, value in (settings | flags).items()}
    return {"settings": settings, "device": runner.device.type,
            "calibration": {"text": text, "sha256_of_ids": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "safetensors")},
            "command": command(script, ckpt=args.ckpt, **options)}


def defaults(args: argparse.Namespace, recorded: dict | None = None) -> None:
    """Fill in options not given, from `recorded` or with the paper's values; ValueError for impossible ones."""
    standard = {"samples": 128, "length": 2048, "seed": 0, "ridge": 10.0} | (recorded or {})
    for name, value in standard.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    if not all(type(value) is int for value in (args.samples, args.length, args.seed)):
        raise ValueError(f"samples, length and seed must be integers; got {args.samples}, {args.length}, {args.seed}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be between 0 and 2^63; got {args.seed}")
    ridge = getattr(args, "ridge", 1.0)
    if not isinstance(ridge, int | float) or not 0 < ridge < math.inf:
        raise ValueError(f"--ridge must be a positive number; got {ridge}")
    if args.samples < 1 or args.length < 2:
        raise ValueError(f"--samples must be at least 1 and --length at least 2; got {args.samples} and {args.length}")


def compute_dtype(name: str | None, device: str, stored: torch.dtype) -> torch.dtype:
    """The dtype to compute in: as asked, else as stored on a GPU and float32 on a CPU. ValueError for an unusable device."""
    try:
        float(torch.ones(1, device=device, dtype=torch.float64))  # which the solves need
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).splitlines()[0]})") from None
    return DTYPES[name] if name else torch.float32 if torch.device(device).type == "cpu" else stored


def main() -> None:
    parser = console.parser("Show why, and where, a model can be flattened.", __doc__)
    parser.add_argument("--ckpt", required=True, help="checkpoint folder")
    add_arguments(parser)
    parser.add_argument("--out", type=Path, help="where S goes (default out/NAME-similarity.npy)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier .npy file")
    args = parser.parse_args()
    defaults(args)
    source = Checkpoint(args.ckpt)
    out = args.out or Path("out") / f"{source.name}-similarity.npy"
    if out.exists() and not (args.overwrite and out.suffix == ".npy" and out.is_file()):
        raise ValueError(f"{out} exists already; choose another --out, or replace an .npy file with --overwrite")
    tokens, text = read_tokens(source.path, args)
    runner = Runner(source, args.length, args.device, compute_dtype(args.dtype, args.device, source.dtype))
    found = measure(source, tokens, runner)
    print(f"{args.ckpt}: {source.config.num_hidden_layers} blocks, on {args.samples} x {args.length} tokens of {text}, "
          f"seed {args.seed}\n")
    print("block   stream variance   |attention|/|x|   |MLP|/|x'|   similarity to the next input")
    for i, (variance, attention, mlp) in enumerate(zip(found.variance, found.attention, found.mlp, strict=True)):
        print(f"{i:5d}   {variance:15.4g}   {attention:15.3f}   {mlp:10.3f}   {found.similarity[i, i + 1]:28.3f}")
    print("(the last block's next input is the stream that leaves the model)\n\nS, similarity of block inputs:")
    print("      " + " ".join(f"{j:4d}" for j in range(len(found.S))))
    for i, row in enumerate(found.S):
        print(f"{i:4d}  " + " ".join("    " if j < i else f"{value:4.2f}" for j, value in enumerate(row)))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    with open(partial, "wb") as file:
        np.save(file, found.S.numpy())
    partial.replace(out)
    print(f"\nsaved S to {out}")


if __name__ == "__main__":
    run(main)
