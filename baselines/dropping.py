"""Leave blocks out. Each method says which; the others stay bit for bit.

A method takes the dense network, the number n of blocks to remove and the calibration text, and returns a smaller network.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.network import Calibration, Network
from checkpoint.reader import Weights
from model import Block, Transformer


def without(network: Network, drop: list[int]) -> Network:
    """The network without these blocks."""
    return network.with_blocks([block for i, block in enumerate(network.blocks) if i not in drop])


def smallest(scores: Tensor, n: int) -> list[int]:
    """Indices of the n smallest scores (L,), ascending; of equals the first."""
    return sorted(scores.argsort(stable=True)[:n].tolist())


def block_influence(similarity: Tensor) -> Tensor:
    """1 - cos(stream into block, stream out of it), (L,), from the similarities (L+1, L+1) of all streams.

    Block Influence of ShortGPT (arXiv 2403.03853, eq. 1). The last stream is taken before the final norm.
    """
    return 1 - similarity.diagonal(1)


def plus_rule(scores: Tensor, n: int, first: int = 4, last: int = 2) -> Tensor:
    """The scores with infinity for the first four and last two blocks (Shortened-LLaMA's "+", arXiv 2402.02834, sec. 3).

    In a model too shallow for that, blocks are given free again until n remain: the last two first, then from the
    inside.
    """
    protected = [*range(min(first, len(scores))), *range(len(scores) - 1, max(first, len(scores) - last) - 1, -1)]
    protected = protected[:max(0, len(scores) - n)]
    return scores.index_fill(0, torch.tensor(protected, dtype=torch.long), torch.inf)


def magnitude(block: Weights) -> float:
    """Sum of |w| over a block's weight matrices (Shortened-LLaMA's Magnitude)."""
    return sum(float(tensor.abs().sum(dtype=torch.float64)) for tensor in block.values() if tensor.ndim == 2)


def taylor(network: Network, text: Calibration) -> Tensor:
    """Sum of |w dLoss/dw| over each block's weight matrices, (L,); the gradient is of the mean loss over the whole text.

    Shortened-LLaMA's Taylor: what removing the weights would change to first order.
    """
    runner = text.runner
    blocks = [{name: tensor.to(runner.device, runner.dtype, copy=True) for name, tensor in block.items()}
              for block in network.blocks]
    outer = {name: tensor.to(runner.device, runner.dtype) for name, tensor in network.outside.items()}
    net = Transformer(network.config, [Block(weights, network.config) for weights in blocks], outer).requires_grad_(False)
    layers = net.model["layers"].requires_grad_(True)
    step = max(1, 2048 // text.tokens.shape[1])
    for part in text.tokens.split(step):
        logits = net(part.to(runner.device))[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten().to(runner.device))
        (loss * len(part) / len(text.tokens)).backward()
    text.passes += 3 * len(blocks) / text.depth  # a backward pass costs about two forward passes
    return torch.tensor([sum(float((p.detach() * p.grad).abs().sum(dtype=torch.float64)) for p in layer.parameters()
                              if p.ndim == 2)
                         for layer in layers], dtype=torch.float64)


def last_blocks(network: Network, n: int, text: Calibration) -> Network:
    """The last n blocks go (reverse order; arXiv 2411.15558)."""
    L = len(network.blocks)
    return without(network, list(range(L - n, L)))


def shortgpt(network: Network, n: int, text: Calibration) -> Network:
    """The n blocks of least influence go, measured once (ShortGPT, arXiv 2403.03853, sec. 3)."""
    return without(network, smallest(block_influence(text.measure(network).similarity), n))


def block_steps(network: Network, text: Calibration) -> list:
    """Functions that send streams through each block, in place."""
    return [partial(text.runner.run_block, weights) for weights in network.blocks]


def sleb(network: Network, n: int, text: Calibration) -> Network:
    """n times the block goes without which the calibration loss is smallest; never the first or last (arXiv 2402.09025)."""
    for _ in range(n):
        inner = list(range(1, len(network.blocks) - 1)) or list(range(len(network.blocks)))
        losses = text.losses_without(network, block_steps(network, text), inner)
        network = without(network, [int(losses.argmin())])
    return network


def shortened_ppl(network: Network, n: int, text: Calibration) -> Network:
    """At once, the n blocks whose removal alone costs least calibration loss (Shortened-LLaMA, arXiv 2402.02834: PPL)."""
    losses = text.losses_without(network, block_steps(network, text), list(range(len(network.blocks))))
    return without(network, smallest(losses, n))


def taylor_plus(network: Network, n: int, text: Calibration) -> Network:
    """The n blocks of least |w dL/dw|, the ends of the model protected (Shortened-LLaMA: Taylor+)."""
    return without(network, smallest(plus_rule(taylor(network, text), n), n))


def magnitude_plus(network: Network, n: int, text: Calibration) -> Network:
    """The n blocks of least |w|, the ends of the model protected (Shortened-LLaMA: Magnitude+)."""
    sizes = torch.tensor([magnitude(block) for block in network.blocks], dtype=torch.float64)
    return without(network, smallest(plus_rule(sizes, n), n))


def half_of(name: str) -> int:
    """0 for a tensor of the attention half of a block, 1 for one of the MLP half; each with its norm."""
    return int(name.startswith(("mlp.", "post_attention")))


def blockpruner(network: Network, n: int, text: Calibration) -> Network:
    """Again and again the attention or MLP goes without which the calibration loss is smallest (arXiv 2406.10594, sec. 3).

    Until as many parameters are gone as n blocks have. What remains is no ordinary checkpoint: a block without its
    attention is stored with o_proj = 0, one without its MLP with down_proj = 0.
    """
    halves = [(i, half) for i in range(len(network.blocks)) for half in (0, 1)]
    sizes = {(i, half): sum(tensor.numel() for name, tensor in network.blocks[i].items() if half_of(name) == half)
             for i, half in halves}
    goal, gone = n * network.config.block_parameters(), []
    while sum(sizes[half] for half in gone) < goal:
        steps = [partial((text.runner.attend, text.runner.feed)[half], network.blocks[i]) for i, half in halves]
        losses = text.losses_without(network, steps, list(range(len(halves))), size=0.5)
        gone.append(halves.pop(int(losses.argmin())))
    blocks, absent = [], 0
    for i, weights in enumerate(network.blocks):
        zeroed = [half for half in (0, 1) if (i, half) in gone]
        if len(zeroed) == 1:
            name = ("self_attn.o_proj.weight", "mlp.down_proj.weight")[zeroed[0]]
            weights = weights | {name: torch.zeros_like(weights[name])}
            absent += sizes[i, zeroed[0]]
        if len(zeroed) < 2:
            blocks.append(weights)
    return network.with_blocks(blocks, absent, ordinary=absent == 0)


def streamline_window(similarity: Tensor, n: int) -> int:
    """Start i of the n + 1 blocks whose ends are most alike: largest cos(stream into i, stream out of i + n).

    LLM-Streamline (arXiv 2403.19135, sec. 3.1); similarity (L+1, L+1) of all streams.
    """
    return int(similarity.diagonal(n + 1).argmax())


def streamline_first(network: Network, n: int, text: Calibration) -> Network:
    """n + 1 neighbouring blocks shrink to the first of them: LLM-Streamline's replacement before any training."""
    start = streamline_window(text.measure(network).similarity, n)
    return without(network, list(range(start + 1, start + n + 1)))


def linear_map(x: Tensor, y: Tensor, ridge: float = 1e-6) -> Tensor:
    """M (C, C) that minimises |x + x M - y|^2 over tokens, for streams x, y (..., C); ridge in mean eigenvalues of x^T x."""
    x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.cholesky_solve(x.T @ (y - x), torch.linalg.cholesky(gram))


def streamline_linear(network: Network, n: int, text: Calibration) -> Network:
    """n + 1 neighbouring blocks become one linear map of the stream, the least-squares one.

    A closed-form stand-in of ours for the layer or MLP that LLM-Streamline trains in their place; no ordinary checkpoint,
    and smaller than one with n blocks fewer.
    """
    start = streamline_window(text.measure(network).similarity, n)
    x = text.run(network.blocks[:start], text.embedded(network))
    y = text.run(network.blocks[start:start + n + 1], x.clone())
    replacement = {"linear.weight": linear_map(x, y).to(x.dtype)}
    return network.with_blocks([*network.blocks[:start], replacement, *network.blocks[start + n + 1:]], ordinary=False)


def ward_clusters(distance: Tensor, k: int) -> list[list[int]]:
    """k clusters of n things from their distances (n, n), by Ward's linkage (the merge that adds least variance).

    Lance-Williams recurrence on squared distances. Clusters are sorted by their first member.
    """
    d, clusters = distance.double().square(), [[i] for i in range(len(distance))]
    while len(clusters) > k:
        a, b = min(((i, j) for i in range(len(clusters)) for j in range(i + 1, len(clusters))),
                   key=lambda pair: float(d[pair]))
        na, nb = len(clusters[a]), len(clusters[b])
        sizes = torch.tensor([len(cluster) for cluster in clusters], dtype=d.dtype)
        row = ((na + sizes) * d[a] + (nb + sizes) * d[b] - sizes * d[a, b]) / (na + nb + sizes)
        d[a], d[:, a] = row, row
        keep = [i for i in range(len(clusters)) if i != b]
        clusters[a] = sorted(clusters[a] + clusters[b])
        d, clusters = d[keep][:, keep], [clusters[i] for i in keep]
    return sorted(clusters)


def fcm(network: Network, n: int, text: Calibration) -> Network:
    """Cluster the blocks by the cosine of their mean-pooled outputs; of each cluster the most influential block stays.

    FCM layer fusion: Ward's linkage on 1 - cos, as its code does; clusters need not be neighbours.
    """
    xs, pooled = text.embedded(network), []
    for weights in network.blocks:
        pooled.append(F.normalize(text.run([weights], xs).double().mean(1), dim=-1))     # (N, C), mean over tokens
    states = torch.stack(pooled)
    similarity = torch.einsum("inc,jnc->ij", states, states) / states.shape[1]
    influence = block_influence(text.measure(network).similarity)
    clusters = ward_clusters((1 - similarity).clamp_min(0), len(network.blocks) - n)
    kept = {max(cluster, key=lambda i: float(influence[i])) for cluster in clusters}
    return without(network, [i for i in range(len(network.blocks)) if i not in kept])
