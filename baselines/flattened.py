"""FlattenGPT (arXiv 2602.08858) with each of its parts left out or replaced."""
import torch
from torch import Tensor

from baselines.network import Calibration, Network
from beyond.grouping import damages, least_damage
from beyond.refit import PARTS, QUICK, refit_block
from beyond.regression import RIDGE
from checkpoint.reader import Weights
from flatten import flatten_blocks, mergeable, select_groups
from prune import cut_channels, keep_kv_heads, leverage_score, prune_attention, score_heads


def groups_of(network: Network, n: int, text: Calibration, max_group: int | None = None) -> list[list[int]]:
    """The paper's groups after n merges. ValueError if groups of at most max_group blocks do not allow so many."""
    L, max_group = len(network.blocks), max_group or len(network.blocks)
    if n > (most := mergeable([[i] for i in range(L)], max_group)):
        raise ValueError(f"{L} blocks in groups of at most {max_group} allow {most} merges, not {n}")
    return select_groups(text.measure(network).S, n, max_group)


def wide(network: Network, n: int, text: Calibration, max_group: int | None = None) -> Network:
    """Flattened only: wide blocks, nothing pruned. As many parameters as the dense model, but fewer blocks."""
    return network.with_blocks([flatten_blocks([network.blocks[i] for i in group])
                                for group in groups_of(network, n, text, max_group)], ordinary=False)


def flattengpt(network: Network, n: int, text: Calibration, ridge: float = 10.0, max_group: int | None = None,
               heads: bool = True, channels: bool = True, compensate: bool = True, score=leverage_score) -> Network:
    """The paper's method; `heads` and `channels` say what is pruned, `score` which channels stay (see leverage_score)."""
    runner, config = text.runner, network.config
    groups = groups_of(network, n, text, max_group)
    xs, blocks = text.embedded(network), []
    for group in groups:
        weights, where = flatten_blocks([network.blocks[i] for i in group]), f"blocks {group}"
        if len(group) > 1 and heads:
            weights = prune_attention(weights, keep_kv_heads(score_heads(weights, xs, runner, where), config), config)
        runner.attend(weights, xs)
        if len(group) > 1 and channels:
            repaired, selected, _ = cut_channels(weights, xs, runner, config.intermediate_size, ridge, where, score)
            weights = repaired if compensate else selected
        runner.feed(weights, xs)
        blocks.append(weights)
    text.passes += 1
    return network.with_blocks(blocks, ordinary=heads and channels)


def refit(network: Network, n: int, text: Calibration, ridge: float = RIDGE, by_damage: bool = False,
          parts: tuple[str, ...] = PARTS) -> Network:
    """Every merged block fitted to the dense model's streams (beyond/refit.py), with groups by similarity or by damage."""
    runner = text.runner

    def trial(members: list[Weights], xs: Tensor, dense: Tensor) -> Weights:
        return refit_block(members, xs, dense, runner, ridge=ridge, parts=QUICK)[0]
    if by_damage:
        groups = least_damage(damages(network, text.tokens, runner, trial, n), len(network.blocks), n)
        text.passes += 3
    else:
        groups = groups_of(network, n, text)
    xs, blocks = text.embedded(network), []
    dense = xs  # one stream until blocks are first joined
    for group in groups:
        members = [network.blocks[i] for i in group]
        if len(group) == 1:
            for stream in (xs,) if dense is xs else (xs, dense):
                runner.run_block(members[0], stream)
            blocks += members
        else:
            dense = xs.clone() if dense is xs else dense
            blocks.append(refit_block(members, xs, dense, runner, ridge=ridge, parts=parts)[0])
    text.passes += 2
    return network.with_blocks(blocks)


def magnitude_score(C: Tensor, ridge: float, down: Tensor) -> Tensor:
    """Norm of each channel's column of down_proj, whatever the text."""
    return down.double().norm(dim=0)


def wanda_score(C: Tensor, ridge: float, down: Tensor) -> Tensor:
    """Norm of the activation times norm of the column that reads it (in the manner of Wanda, arXiv 2306.11695)."""
    return C.diagonal().double().sqrt() * down.double().norm(dim=0)


def random_score(C: Tensor, ridge: float, down: Tensor) -> Tensor:
    """No score at all: a fixed random order."""
    return torch.rand(len(C), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(C.device)
