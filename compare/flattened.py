"""FlattenGPT (arXiv 2602.08858) with each of its parts left out or replaced."""
import torch
from torch import Tensor

from beyond.grouping import LARGEST, Damage, least_damage, split
from beyond.refit import refit_groups, try_merges
from compare.network import Calibration, Network
from flatten import flatten_blocks, keep_wide, merge_groups, mergeable, paper, select_groups
from prune import leverage_score


def groups_of(network: Network, n: int, text: Calibration,
              max_group: int | None = None) -> list[list[int]]:
    """Return the paper's groups after n merges.

    ValueError if groups of at most max_group blocks do not allow n merges.
    """
    L, max_group = len(network.blocks), max_group or len(network.blocks)
    most = mergeable([[i] for i in range(L)], max_group)
    if n > most:
        raise ValueError(f"{L} blocks in groups of at most {max_group} allow {most} merges, "
                         f"not {n}")
    return select_groups(text.measure(network).S, n, max_group)


def wide(network: Network, n: int, text: Calibration, max_group: int | None = None) -> Network:
    """Flatten, and prune nothing: fewer blocks, but as many parameters as the dense model."""
    groups = groups_of(network, n, text, max_group)
    blocks = [flatten_blocks([network.blocks[i] for i in group]) for group in groups]
    return network.with_blocks(blocks, ordinary=False)


def flattengpt(network: Network, n: int, text: Calibration, ridge: float = 10.0,
               max_group: int | None = None, heads: bool = True, channels: bool = True,
               compensate: bool = True, score=leverage_score) -> Network:
    """Flatten and prune as the paper does.

    `heads` and `channels` say what is pruned, `score` says which channels stay (see
    leverage_score). With compensate=False the channels that go are not folded into the others.
    """
    groups, xs = groups_of(network, n, text, max_group), text.embedded(network)
    prune_heads, prune_channels = paper(text.runner, ridge, compensate=compensate, score=score)
    keep_heads, keep_channels = keep_wide()
    attention = prune_heads if heads else keep_heads
    mlp = prune_channels if channels else keep_channels
    merged = merge_groups(network, groups, xs, text.runner, attention, mlp)
    blocks = [block for block, _ in merged]
    text.passes += 1
    return network.with_blocks(blocks, ordinary=heads and channels)


def refit(network: Network, n: int, text: Calibration, by_damage: bool = False,
          **options) -> Network:
    """Fit every merged block to the dense model's streams (beyond/refit.py).

    Groups are those of the paper, or with by_damage=True those that do the least measured damage.
    `options` are those of refit_groups. With first_only=True nothing is flattened: of each group
    the first block is fitted to what all do, and the others are left out. This control says what
    fitting is worth without flattening.
    """
    if by_damage:
        L = len(network.blocks)
        # Other numbers of merges have the same trials, if groups may be as long (try_merges), and
        # if as many of these are tried (grouping.candidates).
        key = min(LARGEST, n + 1), n > L // 2, *sorted(options.items())
        damage = text.once(network, key, lambda: try_merges(
            network, text.tokens, text.runner, n, **options))
        groups = least_damage(damage, L, n)
        text.passes += passes_of_trials(damage, text.tokens, L)
    else:
        groups = groups_of(network, n, text)
    xs = text.embedded(network)
    fitted = refit_groups(network, groups, xs, text.runner, **options)
    blocks = [block for block, _ in fitted]
    text.passes += 2
    return network.with_blocks(blocks)


def passes_of_trials(damage: Damage, tokens: Tensor, L: int) -> float:
    """Return how many passes of all tokens (N, T) through L blocks the trials of `damages` took.

    Their windows pass once for each size of group. To merge takes two passes through the members,
    and what judges passes through the merged block and all above.
    """
    build, judge = (len(part) / len(tokens) for part in split(tokens))
    merging = sum(2 * (last - first + 1) * build + (L - last) * judge for first, last in damage)
    sizes = {last - first for first, last in damage}
    return merging / L + len(sizes) * (build + judge)


def magnitude_score(C: Tensor, ridge: float, down: Tensor) -> Tensor:
    """Score each channel by the norm of its column of down_proj, whatever the text."""
    return down.double().norm(dim=0)


def wanda_score(C: Tensor, ridge: float, down: Tensor) -> Tensor:
    """Score by the norm of the activation times that of the column that reads it.

    This is the manner of Wanda (arXiv 2306.11695).
    """
    return C.diagonal().double().sqrt() * down.double().norm(dim=0)


def random_score(C: Tensor, ridge: float, down: Tensor) -> Tensor:
    """Score by chance: a fixed random order."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(len(C), generator=generator, dtype=torch.float64).to(C.device)
