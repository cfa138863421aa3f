"""Group blocks by the damage that joining them does, instead of by how alike their inputs are.

Similar inputs say that members could share one. They do not say whether heads and channels can be
spared, nor whether the rest of the network minds. So damage is measured. Every pair of neighbours,
and half of the triples (all, if pairs do not suffice), is merged alone for trial. The merge is that
of the final run, made from less text. The model with that one merge is compared with the dense one.
The groups are those of least total damage.

`python -m beyond.refit` does this, unless it gets `--group-by similarity`.
"""
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

import parallel
from console import progress
from evaluate import divergence, readout
from flatten import merge_groups
from model import Runner, check_finite, embed

LARGEST = 3    # blocks in a group
BUILD = 2**12  # tokens that make trial merges, or four windows if these have more
JUDGE = 2**10  # tokens that judge them, or two windows

Damage = dict[tuple[int, int], float]  # (first, last) block of a group -> KL, nats a token


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Choose windows that make trial merges, and others that judge them, from tokens (N, T).

    A merge fits the text that it was made from, so other text must judge. Both are evenly spread,
    and at most half of the windows make. A single window has to do for both.
    """
    N, T = tokens.shape
    if N == 1:
        return tokens, tokens
    made = evenly(N, min(N // 2, max(4, BUILD // T)))
    rest = [i for i in range(N) if i not in made]
    return tokens[made], tokens[[rest[i] for i in evenly(len(rest), max(2, JUDGE // T))]]


def evenly(N: int, most: int) -> list[int]:
    """Return at most this many of the numbers below N, evenly spread."""
    n = min(N, most)
    return [i * N // n for i in range(n)]


def candidates(damage: Damage, L: int, size: int, merges: int) -> list[tuple[int, int]]:
    """List the groups of `size` blocks that are worth a trial, as (first, last), in order.

    Of pairs these are all. Of longer groups it is the promising half: those whose two parts, one
    block shorter and tried before, did least damage together. All groups are tried if pairs alone
    cannot make the merges.
    """
    groups = [(i, i + size - 1) for i in range(L - size + 1)]
    if size == 2 or merges > L // 2:
        return groups
    hopes = {(i, j): damage[i, j - 1] + damage[i + 1, j] for i, j in groups
             if (i, j - 1) in damage and (i + 1, j) in damage}
    half = -(-len(groups) // 2)  # rounded up
    return sorted(sorted(hopes, key=hopes.get)[:half])


def damages(source, tokens: Tensor, runner: Runner,
            halves: Callable[[Tensor], tuple[Callable, Callable]], merges: int,
            needs: dict[str, int], largest: int = LARGEST) -> Damage:
    """Merge each of the `candidates` alone, and measure how far the model's predictions move.

    halves(dense) makes the two halves of a merge (see flatten.merge_groups) from the dense stream
    that enters the group. A merge is made and judged on the windows that `split` chooses. For each
    size of group every block is read once, and serves all trials: their streams, of the judging
    windows, pass through it together. Up to L - 1 of them are held at once. `needs` is the memory
    of a merge of all windows, by which Runner.home places them.
    """
    L, outer, damage = source.config.num_hidden_layers, source.outer(), {}
    for_build, for_judge = split(tokens)
    logits_of = readout(outer, runner)
    for size in range(2, largest + 1):
        trials = {}  # (first, last) -> the stream of the model with that merge
        chosen = candidates(damage, L, size, merges)
        build, judge = (runner.home(embed(outer, parallel.share(part), runner.dtype), needs)
                        for part in (for_build, for_judge))
        near = {}    # the block at hand and the next ones, as many as a group has
        for k in progress(range(L), f"try merges of {size}: blocks", L):
            near = {i: near.get(i) or source.block(i) for i in range(k, min(k + size, L))}
            passing = [ys for (_, last), ys in trials.items() if last < k]
            if (k, k + size - 1) in chosen:  # here `build` and `judge` enter block k
                trial = merge_groups(SimpleNamespace(block=near.get), [sorted(near)],
                                     build.clone(), runner, *halves(build.clone()))
                merged, _ = next(trial)
                trials[k, k + size - 1] = runner.home(judge.clone(), needs)
                runner.run_block(merged, trials[k, k + size - 1])
            runner.run_block(near[k], build, judge, *passing)
        for (i, j), ys in trials.items():
            damage[i, j] = divergence(logits_of, judge, logits_of, ys, runner.device)
            check_finite({"its predictions": torch.tensor(damage[i, j])}, f"blocks {i}-{j} merged")
    return damage


def least_damage(damage: Damage, L: int, merges: int) -> list[list[int]]:
    """Choose the groups of L blocks that make `merges` merges with the least sum of damage.

    Dynamic programming: the best groups of the first `stop` blocks are the best groups of the first
    `start` blocks, and one more group. A block alone does no damage. ValueError if the groups in
    `damage` do not allow that many merges.
    """
    best = {(0, 0): (0.0, [])}  # (blocks used, merges made) -> (damage, groups)
    for stop in range(1, L + 1):
        for start in range(stop):
            cost = 0.0 if stop - start == 1 else damage.get((start, stop - 1))
            if cost is None:  # not tried
                continue
            for before in range(merges + 1):
                after = before + stop - start - 1
                if (start, before) in best and after <= merges:
                    total, groups = best[start, before]
                    option = (total + cost, [*groups, list(range(start, stop))])
                    best[stop, after] = min(best.get((stop, after), option), option)
    if (L, merges) not in best:
        raise ValueError(f"{L} blocks cannot be joined {merges} times in groups of the sizes that "
                         "were tried; lower --ratio, or use --group-by similarity")
    return best[L, merges][1]
