"""Measure how alike the inputs of a model's blocks are, and why.

Two facts decide whether a model can be flattened. How alike are the inputs of its blocks? That is
the matrix S,

    S[i, j] = mean over tokens t of cos( x_i[t], x_j[t] ),      x_i the stream that enters block i

and S close to 1 between neighbours means that they may as well read the same input. And why are
they alike? Because the stream grows with depth, while what a block adds does not keep up. Two
numbers of each block show it: the variance of its stream, and the norms of what attention and MLP
add, relative to the stream.

    python calibrate.py --ckpt PATH            prints both for a model and saves S as an .npy file
"""
import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import console
import parallel
from checkpoint.config import read_json
from checkpoint.reader import Checkpoint
from console import forecast, progress
from console.options import add_run_options, compute_dtype, defaults
from model import (
    Block,
    Runner,
    Transformer,
    check_finite,
    embed,
    generate,
    load,
    sum_dtype,
)
from text.tokenizer import Tokenizer, load_tokenizer
from text.wikitext import SELF, cache_folder, calibration_text, complete

MEASURED = 2**14  # tokens of the text tell how alike its streams are
SAMPLE = 2048  # of these, tokens on which streams that are not neighbours are compared
PIECES = 32    # of that sample: their differences tell the error of S
TOGETHER = 16  # windows that the model writes at a time, for --data self
TEMPERATURE = 1.0  # at which it writes them: as often as it predicts


@dataclass
class Measurement:
    """What one pass tells about a model of L blocks: means over tokens.

    Row i of `similarity` is about the stream that enters block i, and the last row about the stream
    that leaves the last block. The rest holds one number for each block.
    """
    similarity: Tensor  # (L+1, L+1) cosines
    variance: Tensor    # (L,) of the stream's channels
    attention: Tensor   # (L,) |attention output| / |stream it is added to|
    mlp: Tensor         # (L,) |MLP output| / |stream it is added to|
    error: Tensor       # (L+1, L+1) standard error of `similarity`, from differences in the text

    @property
    def S(self) -> Tensor:
        """The cosine similarity of the blocks' inputs, (L, L)."""
        return self.similarity[:-1, :-1]


def cosine_sums(states: list[Tensor]) -> Tensor:
    """Sum the cosine of every pair of n streams (..., C) over their tokens.

    Returns (n, n) in float32 or better.
    """
    flat = [x.flatten(0, -2) for x in states]                               # n of (tokens, C)
    numbers = 2**22 if flat[0].device.type == "cpu" else 2**27  # at a time, for little memory
    step = max(1, numbers // (len(flat) * flat[0].shape[1]))    # in tokens
    total = 0
    for t in range(0, max(1, len(flat[0])), step):
        unit = torch.stack([
            F.normalize(x[t:t + step].to(sum_dtype(x.dtype)), dim=-1).flatten()
            for x in flat])                                                 # (n, step*C)
        total = total + unit @ unit.T                       # each a dot over tokens and channels
    return total


def windows_measured(N: int, T: int) -> int:
    """Return how many of N windows of T tokens are measured: one, or at most MEASURED tokens."""
    return max(1, min(N, MEASURED // T))


def spread(tokens: int) -> Tensor:
    """Choose SAMPLE of the text's tokens, or all if there are fewer. Returns their indices.

    The text is cut into SAMPLE stretches, equal but for rounding, and each gives one token by
    chance. A fixed step could meet the same position in every window: the first token, for one, is
    like no other.
    """
    n = min(SAMPLE, tokens)
    chance = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((torch.arange(n) + chance) * (tokens / n)).long()


def pieces_of(N: int, T: int) -> Tensor:
    """Return which of PIECES pieces each token of the sample is from, (N, T), and -1 for others."""
    sample, pieces = spread(N * T), torch.full((N * T,), -1)
    pieces[sample] = torch.arange(len(sample)) * PIECES // len(sample)
    return pieces.view(N, T)


def mean_cosines(streams: list[Tensor], pieces: Tensor,
                 device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean cosine of every pair of n streams (tokens, C), and its standard error.

    Both are (n, n). pieces (tokens,) says which of PIECES pieces of the text a token is from. The
    error is computed from the differences between the pieces, because tokens near each other are
    alike. So it says how far other text of the same kind would differ, and a denser sample of the
    same windows would not make it smaller.
    """
    own = [(pieces == piece).nonzero().flatten() for piece in range(PIECES)]
    counts = parallel.total(torch.tensor([len(rows) for rows in own]).double())     # (PIECES,)
    own = [rows.to(streams[0].device) for rows in own]
    sums = torch.stack([cosine_sums([x[rows].to(device) for x in streams])
                        for rows in own]).cpu().double()                    # (PIECES, n, n)
    mean = parallel.total(sums).sum(0) / counts.sum()
    scatter = (sums - mean * counts[:, None, None]).square().sum(0)
    used = int(counts.count_nonzero())
    error = (scatter * used / (used - 1)).sqrt() / counts.sum() if used > 1 else mean * torch.nan
    return mean, error


@torch.inference_mode()
def measure(source: Checkpoint, tokens: Tensor, runner: Runner) -> Measurement:
    """Pass windows of tokens (N, T) through all L blocks and measure.

    Means over tokens need no more than MEASURED of them, so of a longer text some windows are
    taken, evenly spread. They pass through a block before the next one is read, so every block is
    read once. Streams that are neighbours are at hand together, and compared on all these tokens.
    For the others, L + 1 streams are kept, but only of a SAMPLE of tokens, spread over the windows.
    The memory is that of one stream, N T C numbers, and of the sample, (L + 1) SAMPLE C numbers.
    ValueError names a block that holds or makes NaN or infinity.
    """
    L, outer = source.config.num_hidden_layers, source.outer()
    check_finite(outer, "outside the blocks")
    N, n = len(tokens), windows_measured(*tokens.shape)
    tokens = tokens[[i * N // n for i in range(n)]]
    mine = parallel.share(tokens)
    needs = forecast.measuring(source.config, *mine.shape, runner.dtype.itemsize, SAMPLE)
    xs = runner.home(embed(outer, mine, runner.dtype), needs)
    pieces = parallel.share(pieces_of(*tokens.shape)).flatten()
    sample = (pieces >= 0).nonzero().flatten()
    here = sample.to(xs.device)
    kept = [xs.flatten(0, 1)[here]]                         # L + 1 streams (SAMPLE, C)
    sums = torch.zeros(4, L, dtype=torch.float64)
    for i in progress(range(L), "measure: blocks", L):
        block, found = runner.block(source.block(i)), []
        check_finite(block.state_dict(), f"block {i}")
        for rows, (x,) in runner.batches(xs):
            y, observed = observe(block, x, runner.rope)
            xs[rows].copy_(y, non_blocking=True)
            found.append(observed)
        for observed in torch.stack(found).cpu():  # once: the device need not stop for each batch
            sums[:, i] += observed
        check_finite({"its output": sums[3, i]}, f"block {i}")  # a cosine with what is not is NaN
        kept.append(xs.flatten(0, 1)[here])
    similarity, error = mean_cosines(kept, pieces[sample], runner.device)
    variance, attention, mlp, neighbours = parallel.total(sums) / tokens.numel()
    for side in (1, -1):
        similarity.diagonal(side).copy_(neighbours)
    return Measurement(similarity, variance, attention, mlp, error)


def observe(block: Block, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Run a block on x (B, T, C). Returns its output and four sums over tokens.

    They are the stream's variance, |attention| / |x|, |MLP| / |the stream it is added to|, and the
    cosine between x and the output.
    """
    attention = block.attend(x, rope)
    middle = x + attention
    mlp = block.feed(middle)
    dtype = sum_dtype(x.dtype)
    norms = [(part.to(dtype).norm(dim=-1) / base.to(dtype).norm(dim=-1).clamp_min(1e-30)).sum()
             for part, base in ((attention, x), (mlp, middle))]
    stream = x.to(dtype)
    centred = stream - stream.mean(-1, keepdim=True)
    variance = centred.square().mean(-1).sum()  # x.var would warn of a process without windows
    y = middle + mlp
    return y, torch.stack([variance, *norms, cosine_sums([x, y])[0, 1]])


# ---- calibration text

def calibration_tokens(ids: Tensor, n: int, length: int, seed: int,
                       name: str = "the calibration text") -> Tensor:
    """Cut n windows (n, length) out of token ids (tokens,), at random places that the seed decides.

    ValueError if the text has fewer than n * length tokens: windows would mostly repeat each other.
    """
    if len(ids) < length:
        raise ValueError(f"{name} has {len(ids)} tokens, fewer than one window of "
                         f"--length {length}; give a longer text or a smaller --length")
    if len(ids) < n * length:
        raise ValueError(f"{name} has {len(ids)} tokens, and {n} windows of --length {length} ask "
                         f"for {n * length}; give a longer text, or fewer --samples "
                         f"({len(ids) // length} windows fit)")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (n,), generator=generator)
    return torch.stack([ids[start:start + length] for start in starts.tolist()])


def mixed_tokens(texts: list[Tensor | Callable], n: int, length: int, seed: int) -> Tensor:
    """Cut n windows (n, length) out of m texts in turn.

    A text is its token ids (tokens,), or the function that writes windows, as read_texts has it.
    In each round of m windows every text has one turn, in random order. If the order were fixed,
    methods that look at every fourth window might see one text only. A text that is given twice
    gets a double share. One text alone gives the windows of calibration_tokens. ValueError if a
    text is too short for its share, or if there are fewer windows than texts.
    """
    m = len(texts)
    if n < m:
        raise ValueError(f"--samples {n} is too few for {m} texts; give at least one for each")
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(m, generator=generator) for _ in range(0, n, m)]
    turns = torch.cat(rounds)[:n]                           # which text each window is from
    tokens = torch.empty(n, length, dtype=torch.long)
    # what is written comes last: a text that is too short fails before that long work
    for i, ids in sorted(enumerate(texts, 1), key=lambda text: callable(text[1])):
        same = torch.tensor([ids is other if callable(ids) or callable(other) else
                             torch.equal(ids, other) for other in texts])
        rows = same[turns]                                  # all turns of a text given twice
        name = f"text {i} of --data" if m > 1 else "the calibration text"
        windows = ids if callable(ids) else partial(calibration_tokens, ids, name=name)
        tokens[rows] = windows(int(rows.sum()), length, seed)
    return tokens


def read_texts(ckpt: Path, args: argparse.Namespace) -> tuple[list[Tensor | Callable], str]:
    """Read the token ids (tokens,) of each text of --data, by the checkpoint's own tokenizer.

    In place of the model's own text there is a function: (windows, length, seed) -> ids (windows,
    length). Returns them, and the names of the texts in one string.
    """
    tokenizer, data, read = load_tokenizer(ckpt), args.data or [None], {}
    for path in dict.fromkeys(data):  # each is read once, if given twice
        if path == SELF:
            source = Checkpoint(ckpt)
            dtype = compute_dtype(args.dtype, args.device, source.dtype)
            first = opening(tokenizer, source.raw)
            read[path] = (partial(written, source, first, args.device, dtype),
                          f"the model's own text at temperature {TEMPERATURE:g}")
        else:
            text, name = calibration_text(path)
            read[path] = torch.tensor(tokenizer.encode(text), dtype=torch.long), name
    return [read[path][0] for path in data], " + ".join(read[path][1] for path in data)


def read_tokens(ckpt: Path, args: argparse.Namespace) -> tuple[Tensor, str]:
    """Read calibration windows (samples, length), or let the model write them.

    Returns them, and the names of the texts that they are from.
    """
    texts, names = read_texts(ckpt, args)
    return mixed_tokens(texts, args.samples, args.length, args.seed), names


# ---- text that the model writes itself, for --data self

def opening(tokenizer: Tokenizer, config: dict) -> int:
    """Choose the token before the first one of a document, from which a model can write one.

    It is BOS if the tokenizer puts that in front. Else it is <|endoftext|>, which SmolLM and Qwen
    have between documents, or else the BOS or the end that tokenizer or config.json name.
    ValueError if they name none.
    """
    end = tokenizer.added.get("<|endoftext|>")
    first = tokenizer.bos_id if tokenizer.add_bos or end is None else end.id
    ends = config.get("eos_token_id")  # one or, as in LLaMA-3, several
    named = [first, config.get("bos_token_id"), *(ends if isinstance(ends, list) else [ends])]
    ids = [i for i in named if type(i) is int]
    if not ids:
        raise ValueError("--data self: neither the tokenizer nor config.json names a token that "
                         "starts or ends a text; name another text")
    return ids[0]


def write(net: Transformer, starts: Tensor, length: int, seed: int) -> Tensor:
    """Let a model write windows (n, length) of text. Each begins with its start, of starts (n, 1).

    Tokens are drawn at TEMPERATURE. After an end of text the model goes on with another one. Each
    batch of TOGETHER windows is drawn with a seed of its own, so another TOGETHER would write other
    text. Several processes share the batches.
    """
    ids = torch.zeros(len(starts), length, dtype=torch.long)
    rows = torch.arange(len(starts)).split(TOGETHER)
    seeds = torch.randint(2**62, (len(rows),), generator=torch.Generator().manual_seed(seed))
    mine = parallel.share(list(zip(rows, seeds.tolist(), strict=True)))
    for k, (batch, chance) in enumerate(mine, 1):
        what = f"write text, batch {k} of {len(mine)}: tokens"
        ids[batch] = generate(net, starts[batch], length - 1, TEMPERATURE, seed=chance,
                              steps=lambda n, what=what: progress(range(n), what, n)).cpu()
    return parallel.total(ids)


def written(source: Checkpoint, first: int, device: str, dtype: torch.dtype, n: int, length: int,
            seed: int) -> Tensor:
    """Read n windows (n, length) that the model has written, each from the token `first` on.

    They are written now, with the whole model in memory, unless they are in the user's cache. A
    checkpoint of --keep-wide needs those of the dense model. ValueError if these are not there, if
    the file is damaged, or if the model holds NaN or infinity.
    """
    digest = (read_json(source.path / "flatten.json").get("source_sha256") if source.is_wide
              else source.digest())
    kind = f"{n}x{length}-seed{seed}-t{TEMPERATURE:g}-{str(dtype).removeprefix('torch.')}"
    path = cache_folder() / f"self-{digest}-{kind}.safetensors"
    if parallel.total(int(path.exists())) == parallel.ranks():  # each of several processes has it
        try:
            ids = safetensors.torch.load_file(path)["ids"]
        except (safetensors.SafetensorError, KeyError):
            ids = torch.empty(0)
        if ids.dtype != torch.long or ids.shape != (n, length) or not (ids[:, 0] == first).all():
            raise ValueError(f"{path} is damaged, or of another tokenizer; delete it, and the "
                             "model writes it again")
        return ids
    if source.is_wide:
        raise ValueError(f"{source.path}: the text that the dense model wrote is not at {path} any "
                         "more, and a wide model would write another; flatten again")
    with complete(path) as file:
        net, starts = load(source.path, device, dtype), torch.full((n, 1), first, device=device)
        check_finite(net.state_dict() | {"its predictions": net(starts[:1])}, str(source.path))
        ids = write(net, starts, length, seed)
        file.write(safetensors.torch.save({"ids": ids}))
    return ids


# ---- the command

def show(measured: Measurement) -> None:
    """Print a table of the blocks, and S."""
    print("block   stream variance   |attention|/|x|   |MLP|/|x'|   similarity to the next input")
    columns = measured.variance, measured.attention, measured.mlp, measured.similarity.diagonal(1)
    for i, (variance, attention, mlp, next_input) in enumerate(zip(*columns, strict=True)):
        print(f"{i:5d}   {variance:15.4g}   {attention:15.3f}   {mlp:10.3f}   {next_input:28.3f}")
    print("(the last block's next input is the stream that leaves the model)\n\n"
          "S, similarity of block inputs, with a standard error of at most "
          f"{float(measured.error.max()):.2g}:")
    print("      " + " ".join(f"{j:4d}" for j in range(len(measured.S))))
    for i, row in enumerate(measured.S):
        values = ("    " if j < i else f"{value:4.2f}" for j, value in enumerate(row))
        print(f"{i:4d}  " + " ".join(values))


def save(S: Tensor, out: Path) -> None:
    """Write S as an .npy file, which appears complete or not at all."""
    if parallel.rank():
        return
    with complete(out) as file:
        np.save(file, S.numpy())


def main() -> None:
    parser = console.parser("Show why, and where, a model can be flattened.", __doc__)
    parser.add_argument("--ckpt", required=True, help="checkpoint folder")
    add_run_options(parser)
    parser.add_argument("--out", type=Path, help="where S goes (default out/NAME-similarity.npy)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier .npy file")
    args = parser.parse_args()
    defaults(args)
    source = Checkpoint(args.ckpt)
    out = args.out or Path("out") / f"{source.name}-similarity.npy"
    if out.exists() and not (args.overwrite and out.suffix == ".npy" and out.is_file()):
        raise ValueError(f"{out} exists already; choose another --out, or replace an .npy file "
                         "with --overwrite")
    tokens, name = read_tokens(source.path, args)
    dtype = compute_dtype(args.dtype, args.device, source.dtype)
    runner = Runner(source.config, args.length, args.device, dtype)
    measured = measure(source, tokens, runner)
    print(f"{args.ckpt}: {source.config.num_hidden_layers} blocks, on "
          f"{windows_measured(*tokens.shape)} of {args.samples} windows of {args.length} tokens of "
          f"{name}, seed {args.seed}\n")
    show(measured)
    save(measured.S, out)
    print(f"\nsaved S to {out}")


if __name__ == "__main__":
    console.run(main, torchrun="together")
