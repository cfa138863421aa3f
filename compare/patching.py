"""Leave blocks out, and change weights or the stream around the gap so that the rest fits again.

The gap is between stream `start`, which entered the first block left out, and stream `start + n`,
which entered the block after the last one. All three methods are closed-form.
"""
import torch
from torch import Tensor

from beyond.refit import DOWN_PROJ
from checkpoint.reader import Weights
from compare.dropping import block_influence, linear_map, smallest, streamline_window
from compare.network import Calibration, Network
from flatten import WRITES
from model import Runner


def scaled_writes(weights: Weights, scale: float) -> Weights:
    """Return the block with everything that it adds to the stream multiplied by `scale`."""
    return weights | {name: (weights[name].double() * scale).to(weights[name]) for name in WRITES}


def mlp_output(weights: Weights, xs: Tensor, runner: Runner) -> Tensor:
    """Return what the block's MLP adds to streams xs that have passed its attention."""
    added, block = xs.clone(), runner.block(weights)
    runner.update(added, block.feed)
    return added


def replaceme(network: Network, n: int, text: Calibration) -> Network:
    """Leave out n neighbouring blocks, and fold a linear map into the down_proj before them.

    M is what that MLP adds to the stream Y, and X is the stream after the gap. The map is
    T = (M^T M)^-1 M^T (X - Y), the least-squares form of ReplaceMe (arXiv 2505.02819). For M^T M
    that cannot be inverted there is a tiny ridge, which pulls T to the identity. The gap is where
    the streams before and after it are most alike by their mean cosine (the paper takes the mean
    angle). The first block always stays.
    """
    similarity = text.measure(network).similarity
    start = 1 + int(similarity.diagonal(n)[1:].argmax())
    below, last = network.blocks[:start - 1], network.blocks[start - 1]
    ys = text.run(below, text.embedded(network))
    text.runner.attend(last, ys)
    added = mlp_output(last, ys, text.runner)
    after = text.run(network.blocks[start:start + n], ys + added)
    text.passes += 1 / text.depth
    T = linear_map(added, after - ys)
    T.diagonal().add_(1)
    down = last[DOWN_PROJ]
    patched = last | {DOWN_PROJ: (T.T @ down.to(T)).to(down)}
    return network.with_blocks([*below, patched, *network.blocks[start + n:]])


def size_ratios(xs: Tensor, ys: Tensor) -> Tensor:
    """Return how much larger each channel of the streams ys is than that of xs, (C,).

    In each window it is mean |y| over mean |x|, means over tokens; then the mean over windows is
    taken. xs and ys are (N, T, C).
    """
    return (ys.abs().mean(1) / xs.abs().mean(1)).mean(0)


def hadamard(C: int) -> Tensor:
    """Return an orthogonal matrix (C, C) of Hadamard blocks, symmetric.

    A block is Sylvester's Hadamard matrix of the largest power of two that divides C, so for C a
    power of two there is one block.
    """
    block = torch.ones(1, 1, dtype=torch.float64)
    while C % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / len(block) ** 0.5] * (C // len(block)))


def rotated_scaling(xs: Tensor, ys: Tensor) -> Tensor:
    """Return H diag(d) H^T (C, C), which gives streams xs (N, T, C) about the sizes of ys.

    H is `hadamard`, and d_k says how much larger channel k of ys H is than that of xs H
    (LinearPatch, arXiv 2505.24680). In the rotated stream no channel is far larger than others.
    """
    H = hadamard(xs.shape[-1])
    return H @ torch.diag(size_ratios(xs.double() @ H, ys.double() @ H)) @ H.T


def linearpatch(network: Network, n: int, text: Calibration) -> Network:
    """Replace n neighbouring blocks by one matrix, the `rotated_scaling` of the stream.

    This is LinearPatch (arXiv 2505.24680) without its training. The gap is where the streams before
    and after it are most alike. Where C is not a power of two, H has several Hadamard blocks; the
    released code takes larger ones where they are known. The result is no ordinary checkpoint, and
    C^2 parameters larger than one with n blocks fewer.
    """
    start = streamline_window(text.measure(network).similarity, n - 1)
    xs = text.run(network.blocks[:start], text.embedded(network))
    ys = text.run(network.blocks[start:start + n], xs.clone())
    P = rotated_scaling(xs, ys)
    P.diagonal().sub_(1)  # a linear map adds its output to the stream
    patch = {"linear.weight": P.to(xs.dtype)}
    return network.with_blocks([*network.blocks[:start], patch, *network.blocks[start + n:]],
                               ordinary=False)


def prune_and_comp(network: Network, n: int, text: Calibration) -> Network:
    """Leave out the block of least influence and make up for the size that it gave the stream.

    n times, each time measured again (Prune&Comp, arXiv 2507.18212, with Block Influence). The
    block makes the stream s times as large, the mean over channels of `size_ratios`. The paper
    multiplies all that is written before the gap by s, the embeddings too. Here all that is written
    after it is divided by s instead. As RMSNorm sees no scale, that is the same function (but for
    the norms' eps), and the embeddings stay what they are, tied to the head or not.
    """
    for _ in range(n):
        (i,) = smallest(block_influence(text.measure(network).similarity), 1)
        xs = text.run(network.blocks[:i], text.embedded(network))
        ys = text.run(network.blocks[i:i + 1], xs.clone())
        scale = float(size_ratios(xs.double(), ys.double()).mean())
        above = [scaled_writes(weights, 1 / scale) for weights in network.blocks[i + 1:]]
        network = network.with_blocks([*network.blocks[:i], *above])
    return network
