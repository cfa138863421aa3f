"""Leave blocks out. Each method says which; the others stay bit for bit.

A method takes the dense network, the number n of blocks to remove and the calibration text.
It returns a smaller network.
"""
import math
from collections.abc import Callable
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint.reader import Weights
from compare.network import Calibration, Network
from evaluate import divergence, kullback_leibler, readout
from flatten import WRITES
from model import Block, Transformer, move


def without(network: Network, drop: list[int]) -> Network:
    """Return the network without these blocks."""
    return network.with_blocks([block for i, block in enumerate(network.blocks) if i not in drop])


def smallest(scores: Tensor, n: int) -> list[int]:
    """Return the indices of the n smallest scores (L,), ascending; ties go to the first."""
    return sorted(scores.argsort(stable=True)[:n].tolist())


def block_influence(similarity: Tensor) -> Tensor:
    """Return 1 - cos(stream into the block, stream out of it) for each block, (L,).

    This is the Block Influence of ShortGPT (arXiv 2403.03853, eq. 1). `similarity` (L+1, L+1) is
    that of all streams; the last one is taken before the final norm.
    """
    return 1 - similarity.diagonal(1)


def plus_rule(scores: Tensor, n: int, first: int = 4, last: int = 2) -> Tensor:
    """Return the scores with infinity for the first four and the last two blocks.

    This is the "+" of Shortened-LLaMA (arXiv 2402.02834, sec. 3). In a model too shallow for it,
    protection is lifted until n blocks may be removed: from the last two first, inner one before
    outer, and then from the first four, again from the inside.
    """
    L = len(scores)
    at_the_end = reversed(range(max(first, L - last), L))
    protected = [*range(min(first, L)), *at_the_end]  # the last of these are given up first
    protected = protected[:max(0, L - n)]
    return scores.index_fill(0, torch.tensor(protected, dtype=torch.long), torch.inf)


def magnitude(block: Weights) -> float:
    """Return the sum of |w| over a block's weight matrices (Shortened-LLaMA's Magnitude)."""
    return sum(float(tensor.abs().sum(dtype=torch.float64))
               for tensor in block.values() if tensor.ndim == 2)


def taylor(network: Network, text: Calibration) -> Tensor:
    """Return the sum of |w dLoss/dw| over each block's weight matrices, (L,).

    The loss is the mean over the whole text. This is Shortened-LLaMA's Taylor: what removing the
    weights would change, to first order.
    """
    config, runner = network.config, text.runner
    blocks = [Block({name: tensor.to(runner.device, runner.dtype, copy=True)
                     for name, tensor in weights.items()}, config) for weights in network.blocks]
    outer = move(network.outside, runner.device, runner.dtype)
    net = Transformer(config, blocks, outer).requires_grad_(False)
    layers = net.model["layers"].requires_grad_(True)
    step = max(1, 2048 // text.tokens.shape[1])
    for part in text.tokens.split(step):
        logits = net(part.to(runner.device))[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten().to(runner.device))
        (loss * len(part) / len(text.tokens)).backward()
    text.passes += 3 * len(blocks) / text.depth  # a backward pass costs about two forward passes
    scores = [sum(float((w.detach() * w.grad).abs().sum(dtype=torch.float64))
                  for w in layer.parameters() if w.ndim == 2) for layer in layers]
    return torch.tensor(scores, dtype=torch.float64)


def last_blocks(network: Network, n: int, text: Calibration) -> Network:
    """Leave out the last n blocks (reverse order; arXiv 2411.15558)."""
    L = len(network.blocks)
    return without(network, list(range(L - n, L)))


def shortgpt(network: Network, n: int, text: Calibration) -> Network:
    """Leave out the n blocks of least influence, measured once (ShortGPT, arXiv 2403.03853)."""
    return without(network, smallest(block_influence(text.measure(network).similarity), n))


def block_steps(network: Network, text: Calibration) -> list:
    """Return one function a block: it sends streams through that block, in place."""
    return [partial(text.runner.run_block, weights) for weights in network.blocks]


def sleb(network: Network, n: int, text: Calibration) -> Network:
    """Leave out the block without which the calibration loss is smallest, n times (SLEB).

    The first and the last block always stay (arXiv 2402.09025).
    """
    for _ in range(n):
        everything = list(range(len(network.blocks)))
        losses = text.losses_without(network, block_steps(network, text),
                                     everything[1:-1] or everything)
        network = without(network, [int(losses.argmin())])
    return network


def shortened_ppl(network: Network, n: int, text: Calibration) -> Network:
    """Leave out the n blocks that cost the least calibration loss when each alone is left out.

    They are chosen all at once (Shortened-LLaMA, arXiv 2402.02834: PPL).
    """
    steps = block_steps(network, text)
    return without(network, smallest(text.losses_without(network, steps, range(len(steps))), n))


def taylor_plus(network: Network, n: int, text: Calibration) -> Network:
    """Leave out the n blocks of least |w dL/dw|; the ends are protected (Shortened-LLaMA)."""
    return without(network, smallest(plus_rule(taylor(network, text), n), n))


def magnitude_plus(network: Network, n: int, text: Calibration) -> Network:
    """Leave out the n blocks of least |w|; the ends are protected (Shortened-LLaMA)."""
    sizes = torch.tensor([magnitude(block) for block in network.blocks], dtype=torch.float64)
    return without(network, smallest(plus_rule(sizes, n), n))


def half_of(name: str) -> int:
    """Return 0 for a tensor of a block's attention half, 1 for its MLP half; norms included."""
    return int(name.startswith(("mlp.", "post_attention")))


def without_halves(network: Network, goal: int, text: Calibration, kinds: tuple[int, ...] = (0, 1),
                   protected: int = 0, score: Callable | None = None) -> Network:
    """Leave out halves of blocks, one at a time, until at least `goal` parameters are gone.

    Each time that half goes without which the calibration loss (or another `score`) is least.
    `kinds` are 0 for attentions, 1 for MLPs; the first `protected` blocks go last. What remains is
    no ordinary checkpoint. A block without its attention is stored with o_proj = 0, one without its
    MLP with down_proj = 0.
    """
    halves = [(i, half) for i in range(len(network.blocks)) for half in (0, 1)]
    sizes = dict.fromkeys(halves, 0)
    for i, weights in enumerate(network.blocks):
        for name, tensor in weights.items():
            sizes[i, half_of(name)] += tensor.numel()
    run_half = text.runner.attend, text.runner.feed
    gone = []
    while sum(sizes[half] for half in gone) < goal:
        steps = [partial(run_half[half], network.blocks[i]) for i, half in halves]
        of_kind = [k for k, (_, half) in enumerate(halves) if half in kinds]
        candidates = [k for k in of_kind if halves[k][0] >= protected] or of_kind
        losses = text.losses_without(network, steps, candidates, size=0.5, score=score)
        gone.append(halves.pop(int(losses.argmin())))
    blocks, absent = [], 0
    for i, weights in enumerate(network.blocks):
        missing = [half for half in (0, 1) if (i, half) in gone]
        if len(missing) == 1:
            name = WRITES[missing[0]]
            weights = weights | {name: torch.zeros_like(weights[name])}
            absent += sizes[i, missing[0]]
        if len(missing) < 2:
            blocks.append(weights)
    return network.with_blocks(blocks, absent, ordinary=absent == 0)


def blockpruner(network: Network, n: int, text: Calibration) -> Network:
    """Leave out attentions or MLPs, one at a time: the one that costs the least calibration loss.

    It ends when as many parameters are gone as n blocks have (arXiv 2406.10594, sec. 3).
    """
    return without_halves(network, n * network.config.block_parameters(), text)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence, (...), for log predictions p and q (..., V)."""
    m = torch.logaddexp(p, q) - math.log(2)  # their mean
    return (kullback_leibler(p, m) + kullback_leibler(q, m)) / 2


def finercut(network: Network, n: int, text: Calibration) -> Network:
    """Leave out attentions or MLPs: each time the one that moves the predictions least (FinerCut).

    Predictions are compared with the dense model's by their Jensen-Shannon divergence (arXiv
    2405.18218). It ends when as many parameters are gone as n blocks have; the paper counts
    halves, large or small, as one. As in its released settings, 40 % of the blocks and one more, at
    the bottom, are protected: here as long as others are left, there until 40 % of all halves are
    gone. Its code puts the mean prediction first in both terms of the divergence; here it comes
    second, as defined.
    """
    dense = text.run(network.blocks, text.embedded(network, trial=True))
    logits_of = readout(network.outside, text.runner)

    def moved(xs: Tensor) -> float:
        return divergence(logits_of, dense, logits_of, xs, text.runner.device, jensen_shannon)
    protected = int(0.4 * len(network.blocks)) + 1
    return without_halves(network, n * network.config.block_parameters(), text,
                          protected=protected, score=moved)


def streamline_window(similarity: Tensor, n: int) -> int:
    """Return the start i of the n + 1 blocks whose ends are most alike (LLM-Streamline).

    They have the largest cos(stream into i, stream out of i + n) (arXiv 2403.19135, sec. 3.1).
    `similarity` (L+1, L+1) is that of all streams.
    """
    return int(similarity.diagonal(n + 1).argmax())


def streamline_first(network: Network, n: int, text: Calibration) -> Network:
    """Shrink n + 1 neighbouring blocks to the first of them.

    This is LLM-Streamline's replacement before any training.
    """
    start = streamline_window(text.measure(network).similarity, n)
    return without(network, list(range(start + 1, start + n + 1)))


def linear_map(x: Tensor, y: Tensor, ridge: float = 1e-6) -> Tensor:
    """Return the M (C, C) that minimises |x + x M - y|^2 over tokens, for streams x, y (..., C).

    `ridge` is in mean eigenvalues of x^T x.
    """
    x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.cholesky_solve(x.T @ (y - x), torch.linalg.cholesky(gram))


def streamline_linear(network: Network, n: int, text: Calibration) -> Network:
    """Replace n + 1 neighbouring blocks by one linear map of the stream, the least-squares one.

    It is a closed-form stand-in of ours for the layer or MLP that LLM-Streamline trains in their
    place. The result is no ordinary checkpoint, and smaller than one with n blocks fewer.
    """
    start = streamline_window(text.measure(network).similarity, n)
    stop = start + n + 1
    x = text.run(network.blocks[:start], text.embedded(network))
    y = text.run(network.blocks[start:stop], x.clone())
    replacement = {"linear.weight": linear_map(x, y).to(x.dtype)}
    return network.with_blocks([*network.blocks[:start], replacement, *network.blocks[stop:]],
                               ordinary=False)


def ward_clusters(distance: Tensor, k: int) -> list[list[int]]:
    """Return k clusters of n things, sorted by first member, from their distances (n, n).

    Ward's linkage: join the two clusters whose union adds the least variance, until k are left.
    """
    d, clusters = distance.double().square(), [[i] for i in range(len(distance))]
    while len(clusters) > k:
        a, b = min(combinations(range(len(clusters)), 2), key=lambda pair: float(d[pair]))
        na, nb = len(clusters[a]), len(clusters[b])
        sizes = torch.tensor([len(cluster) for cluster in clusters], dtype=d.dtype)
        # Lance-Williams: squared distances of the union of a and b from those of a and of b
        row = ((na + sizes) * d[a] + (nb + sizes) * d[b] - sizes * d[a, b]) / (na + nb + sizes)
        d[a], d[:, a] = row, row
        keep = [i for i in range(len(clusters)) if i != b]
        clusters[a] = sorted(clusters[a] + clusters[b])
        d, clusters = d[keep][:, keep], [clusters[i] for i in keep]
    return sorted(clusters)


def fcm(network: Network, n: int, text: Calibration) -> Network:
    """Cluster the blocks by their outputs; of each cluster the most influential block stays.

    This is FCM layer fusion: Ward's linkage on 1 - cos of the outputs' means over tokens, as its
    code does. The blocks of a cluster need not be neighbours.
    """
    xs, pooled = text.embedded(network), []
    for weights in network.blocks:
        mean = text.run([weights], xs).double().mean(1)                     # (N, C), over tokens
        pooled.append(F.normalize(mean, dim=-1))
    states = torch.stack(pooled)                                            # (L, N, C)
    similarity = torch.einsum("inc,jnc->ij", states, states) / states.shape[1]
    influence = block_influence(text.measure(network).similarity)
    clusters = ward_clusters((1 - similarity).clamp_min(0), len(network.blocks) - n)
    kept = {max(cluster, key=lambda i: float(influence[i])) for cluster in clusters}
    return without(network, [i for i in range(len(network.blocks)) if i not in kept])
