"""Group blocks by the damage that joining them does, measured, instead of by how alike their inputs are.

Similar inputs say that members could share one; they do not say whether heads and channels can be spared, nor whether the
rest of the network minds. So every pair of neighbours, and half of the triples, is merged for trial, alone, and the model
with that one merge is compared with the dense one. The groups are those of least total damage. flatten.py --group-by damage.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from calibrate import Runner, batches, embed
from checkpoint.reader import Weights
from console import progress
from evaluate import readout

LARGEST = 3     # blocks in a group
BUILD = 16      # one window in so many makes the trial merges


@torch.inference_mode()
def divergence(logits_of: Callable, xs: Tensor, ys: Tensor, device: torch.device) -> float:
    """Mean over tokens of KL(p || q), in nats: p predicted from the streams xs (N, T, C), q from ys."""
    total = 0.0
    for rows in batches(xs):
        for x, y in zip(xs[rows].flatten(0, 1).split(1024), ys[rows].flatten(0, 1).split(1024), strict=True):
            p, q = (logits_of(states.to(device)).float().log_softmax(-1) for states in (x, y))
            total += float((p.exp() * (p - q)).sum())
    return total / (xs.shape[0] * xs.shape[1])


def split(tokens: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """(windows that make trial merges, other windows that judge them), of the calibration windows (N, T).

    A merge fits the text that it was made from, so other text must judge. A single window has to do for both.
    """
    rest = tokens[[i for i in range(len(tokens)) if i % BUILD]] if len(tokens) > 1 else tokens
    return tokens[::BUILD], rest[::max(1, min(L * len(rest) // len(tokens), len(rest)))]


def candidates(found: dict[tuple[int, int], float], L: int, size: int, merges: int) -> list[tuple[int, int]]:
    """Which groups of so many blocks to try, as (first, last) in order: all pairs; of longer ones the promising half.

    Those are the ones whose two parts of one block less, tried before, did least damage together. All, if pairs cannot
    make so many merges.
    """
    groups = [(i, i + size - 1) for i in range(L - size + 1)]
    if size == 2 or merges > L // 2:
        return groups
    hopes = {(i, j): found[i, j - 1] + found[i + 1, j] for i, j in groups if {(i, j - 1), (i + 1, j)} <= found.keys()}
    return sorted(sorted(hopes, key=hopes.get)[:-(-len(groups) // 2)])


def damages(source, tokens: Tensor, runner: Runner, make: Callable[[list[Weights], Tensor, Tensor], Weights],
            merges: int, largest: int = LARGEST) -> dict[tuple[int, int], float]:
    """{(first, last): divergence of the model in which only these blocks have become one} for `candidates` up to `largest`.

    make(members, xs, dense) is the merge; both streams are the dense model's. It sees one calibration window in BUILD, the
    comparison about one in L of the others: together less than three passes of all windows, however deep the model, if
    there are more windows than blocks.
    """
    L, outer = source.config.num_hidden_layers, source.outer()
    for_build, for_judge = split(tokens, L)
    judge = [embed(outer, for_judge, runner.dtype)]
    for i in range(L):
        judge.append(judge[-1].clone())
        runner.run_block(source.block(i), judge[-1])
    logits_of, found = readout(outer, runner), {}
    for size in range(2, largest + 1):
        build, at, trials = embed(outer, for_build, runner.dtype), 0, candidates(found, L, size, merges)
        for i, j in progress(trials, f"try merges of {size}", len(trials)):
            for k in range(at, i):
                runner.run_block(source.block(k), build)
            at = i
            weights = make([source.block(k) for k in range(i, j + 1)], build.clone(), build.clone())
            ys = judge[i].clone()
            for block in [weights, *(source.block(k) for k in range(j + 1, L))]:
                runner.run_block(block, ys)
            found[i, j] = divergence(logits_of, judge[L], ys, runner.device)
    return found


def least_damage(damage: dict[tuple[int, int], float], L: int, merges: int) -> list[list[int]]:
    """The groups of L neighbouring blocks with so many merges and the least sum of damage, by dynamic programming.

    A block alone does none. ValueError if the groups in `damage` do not allow so many merges.
    """
    best = {(0, 0): (0.0, [])}  # (blocks used, merges made) -> (damage, groups)
    for stop in range(1, L + 1):
        for start in range(stop):
            cost = 0.0 if stop - start == 1 else damage.get((start, stop - 1))
            for done in range(merges + 1) if cost is not None else ():
                if (start, done) in best and (now := done + stop - start - 1) <= merges:
                    option = (best[start, done][0] + cost, [*best[start, done][1], list(range(start, stop))])
                    best[stop, now] = min(best.get((stop, now), option), option)
    if (L, merges) not in best:
        raise ValueError(f"{L} blocks cannot be joined {merges} times in groups of the sizes that were tried; lower "
                         "--ratio, or use --group-by similarity")
    return best[L, merges][1]
