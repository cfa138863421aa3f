"""Share one block among several, each with a low-rank difference of its own.

The opposite of flattening: depth stays, and so does the time that a text takes. What is saved are
parameters alone. It answers why neighbours are flattened, and not shared.
"""
from itertools import count

import torch
from torch import Tensor

from beyond.lora import PROJECTIONS
from checkpoint.reader import Weights
from compare.flattened import groups_of
from compare.network import Calibration, Network
from model import Runner, symmetric


def low_rank(D: Tensor, A: Tensor, rank: int) -> Tensor:
    """Return the matrix of this rank that minimises E|(D - it) x|^2, for D (out, in).

    A = E[x x^T] (in, in) are the second moments of the inputs. The answer is U U^T D, where U are
    the directions of the output in which D writes most: the first eigenvectors of E[D x (D x)^T].
    It is the truncated SVD of D A^(1/2), times A^(-1/2), and needs neither root nor inverse.
    """
    D, A = D.double(), A.double()
    U = torch.linalg.eigh(D @ A @ D.T).eigenvectors[:, D.shape[0] - min(rank, D.shape[0]):]
    return U @ (U.T @ D)


def matrices(weights: Weights) -> dict[str, Tensor]:
    """Return the seven matrices of a block. Norms and biases are not among them."""
    return {name: w for name, w in weights.items()
            if w.ndim == 2 and name.split(".")[-2] in PROJECTIONS}


def mean_of(members: list[Weights]) -> Weights:
    """Return the mean of each matrix over the members of a group: the block that they share."""
    return {name: torch.stack([member[name].double() for member in members]).mean(0)
            for name in matrices(members[0])}


def merges_of(n: int, L: int) -> int:
    """Return how many of L blocks are shared away to save n: a third more, which pays for the rest.
    """
    return min(n + -(-n // 3), L - 1)


def difference_size(shared: Weights, rank: int) -> int:
    """Count the numbers of one member's differences of a rank. None has more than its matrix."""
    return sum(min(rank * sum(W.shape), W.numel()) for W in shared.values())


def affordable_rank(block: Weights, groups: list[list[int]], n: int) -> tuple[int, int]:
    """Return the largest rank at which sharing still saves n blocks, and what it then saves.

    What it saves is a number of parameters. Norms and biases are not shared. ValueError if even
    rank 0 saves too little.
    """
    shared, members = matrices(block), [len(group) for group in groups if len(group) > 1]
    full, target = difference_size(shared, 10**9), n * sum(w.numel() for w in block.values())

    def saved(rank: int) -> int:
        return sum((k - 1) * full - k * difference_size(shared, rank) for k in members)
    if saved(0) < target:
        raise ValueError(f"blocks shared in groups of {members} save less than {n} blocks; "
                         "remove less")
    rank = next(rank for rank in count() if saved(rank + 1) < target)
    return rank, saved(rank)


def moments(weights: Weights, xs: Tensor, runner: Runner) -> dict[str, Tensor]:
    """Return E[x x^T], up to a factor, of what each projection of a block reads, by its name.

    xs (N, T, C) are the streams that enter the block; they leave it.
    """
    block, A = runner.block(weights), {}

    def attention_reads(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        n = block.input_layernorm(x)
        o = block.self_attn.heads(n, runner.rope)
        return [(n, n), (o, o)]

    def mlp_reads(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        n = block.post_attention_layernorm(x)
        psi = block.mlp.channels(n)
        return [(n, n), (psi, psi)]
    A["q_proj"], A["o_proj"] = map(symmetric, runner.sums([xs], attention_reads))
    runner.attend(weights, xs)
    A["up_proj"], A["down_proj"] = map(symmetric, runner.sums([xs], mlp_reads))
    runner.feed(weights, xs)
    return A | {"k_proj": A["q_proj"], "v_proj": A["q_proj"], "gate_proj": A["up_proj"]}


def with_differences(weights: Weights, shared: Weights, A: dict[str, Tensor],
                     rank: int) -> Weights:
    """Return the block with each matrix replaced by the shared one plus a low-rank difference.

    A matrix that is smaller than its difference would be stays.
    """
    made = {}
    for name, W in shared.items():
        if rank * sum(W.shape) < W.numel():
            D = low_rank(weights[name].double() - W, A[name.split(".")[-2]].cpu(), rank)
            made[name] = (W + D).to(weights[name])
    return weights | made


def tied_low_rank(network: Network, n: int, text: Calibration) -> Network:
    """Share the mean of the blocks of a group, and give each of them low-rank differences.

    This is how Relaxed Recursive Transformers (arXiv 2410.20672) start, with the SVD whitened.
    Groups are the paper's after 4n/3 merges. So that many blocks are saved, and a quarter of it
    pays for the differences: as many parameters go as n blocks have. Each member is fitted on what
    the members below it, as they have become, make of the text. The result is in memory only:
    written out as an ordinary checkpoint it would be as large as the dense model.
    """
    groups = groups_of(network, merges_of(n, len(network.blocks)), text)
    rank, saved = affordable_rank(network.blocks[0], groups, n)
    xs, blocks, runner = text.embedded(network), [], text.runner
    for group in groups:
        members = [network.blocks[i] for i in group]
        shared = mean_of(members)
        for member in members:
            if len(group) > 1:
                A = moments(member, xs.clone(), runner)
                member = with_differences(member, shared, A, rank)
            runner.run_block(member, xs)
            blocks.append(member)
    text.passes += 2
    return network.with_blocks(blocks, absent=saved, ordinary=False)
