"""Make one block out of several: by arithmetic on weights, or by picking heads and channels."""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from checkpoint.config import Config
from checkpoint.reader import Weights
from compare.dropping import block_influence
from compare.network import Calibration, Network
from model import Block, Runner, count
from prune import best, channels_of, head_sizes, query_heads_of

# thresholds of similarity, from strict to "anything goes"
THRESHOLDS = [0.95 - 0.05 * k for k in range(20)] + [-1.0]

Merge = Callable[[list[Weights]], Weights]


def differences(blocks: list[Weights]) -> Weights:
    """Return the first block plus what each other block differs from it by (LaCo, eq. 1-2).

    theta_1 + sum_k (theta_k - theta_1), tensor by tensor.
    """
    merged = {}
    for name, first in blocks[0].items():
        differing = sum(block[name].double() - first.double() for block in blocks[1:])
        merged[name] = (first.double() + differing).to(first.dtype)
    return merged


def top_with_bottom_norms(blocks: list[Weights]) -> Weights:
    """Return the last block's matrices with the first block's norms, as LaCo's released code does.

    It changes the first block in place while it takes differences to it. So every difference
    replaces what was there before, and the last block is what remains.
    """
    return blocks[-1] | {name: tensor for name, tensor in blocks[0].items() if "layernorm" in name}


def final_cosine(network: Network, target: Tensor, text: Calibration) -> float:
    """Return how alike a network's final stream and the target (N, T, C) are, on the trial windows.

    It is the cosine of the two, each window flattened into one vector; the mean over windows.
    Streams are compared before the final norm.
    """
    final = text.run(network.blocks, text.embedded(network, trial=True))
    a, b = final.flatten(1).double(), target.flatten(1).double()
    return float(torch.cosine_similarity(a, b).mean())


def collapse(network: Network, first: int, last: int, merge: Merge) -> Network:
    """Return the network with blocks first..last merged into one."""
    blocks = network.blocks
    return network.with_blocks([*blocks[:first], merge(blocks[first:last + 1]), *blocks[last + 1:]])


def laco(network: Network, n: int, text: Calibration, merge: Merge, span: int = 3) -> Network:
    """Walk down from the top and collapse `span` blocks into one where the final stream allows it.

    It must stay similar enough to the dense model's. The walk ends when n blocks are gone (LaCo,
    arXiv 2402.11187, Alg. 1). The paper sets the threshold by hand for each model; here it is the
    strictest of a list that removes n blocks. The paper's interval is 1. A merge at the top, or
    the last one, may be of fewer blocks.
    """
    target = text.run(network.blocks, text.embedded(network, trial=True))
    for threshold in THRESHOLDS:
        current, left = network, n  # blocks that have still to go
        for low in reversed(range(len(network.blocks) - 1)):
            last = min(low + min(span - 1, left), len(current.blocks) - 1)
            if last > low:
                candidate = collapse(current, low, last, merge)
                if final_cosine(candidate, target, text) > threshold:
                    current, left = candidate, left - (last - low)
            if not left:
                return current
    raise ValueError(f"LaCo found no way to remove {n} of {len(network.blocks)} blocks")


def laco_paper(network: Network, n: int, text: Calibration) -> Network:
    """Merge by the formula of LaCo's paper."""
    return laco(network, n, text, differences)


def laco_released(network: Network, n: int, text: Calibration) -> Network:
    """Merge as LaCo's released code computes: a merge keeps the top block's matrices."""
    return laco(network, n, text, top_with_bottom_norms)


def sliding_window_merging(network: Network, n: int, text: Calibration) -> Network:
    """Let a window grow downwards while the model with it collapsed stays similar.

    Then collapse the window and go on below it (arXiv 2502.19159, Alg. 1). Blocks are collapsed by
    LaCo's formula, and the last block is left alone. A window still open at the bottom is
    collapsed too. The threshold is the strictest of a list that removes n blocks.
    """
    target = text.run(network.blocks, text.embedded(network, trial=True))
    for threshold in THRESHOLDS:
        current, left, high = network, n, len(network.blocks) - 2
        while left and high > 0:
            low = high
            while low > 0 and high - low < left:
                candidate = collapse(current, low - 1, high, differences)
                if final_cosine(candidate, target, text) <= threshold:
                    break
                low -= 1
            if low < high:
                current = collapse(current, low, high, differences)
                left -= high - low
            high = low - 1
        if not left:
            return current
    raise ValueError("Sliding-Window-Merging found no way to remove "
                     f"{n} of {len(network.blocks)} blocks")


def weighted(a: Weights, b: Weights, share: float) -> Weights:
    """Return share * a + (1 - share) * b, tensor by tensor, norms too."""
    return {name: (share * a[name].double() + (1 - share) * b[name].double()).to(a[name].dtype)
            for name in a}


def mka_share(similarity: Tensor, i: int, j: int, beta: float = 1.0) -> float:
    """Return the weight of block i when i and j merge: sigmoid(beta s_i / (s_i + s_j)).

    s is the mean similarity of a block to all (MKA, arXiv 2406.16330). As s_i is about s_j, the
    weight is always about 0.62.
    """
    s_i, s_j = float(similarity[i].mean()), float(similarity[j].mean())
    return 1 / (1 + math.exp(-beta * s_i / (s_i + s_j)))


def mka(network: Network, n: int, text: Calibration) -> Network:
    """Replace the last two blocks by their weighted mean, n times (MKA's pairwise merge).

    Similarity here is the cosine of the blocks' outputs. In the paper (arXiv 2406.16330) it is the
    mutual information of diffusion maps of those outputs.
    """
    similarity = text.measure(network).similarity[1:, 1:]
    for _ in range(n):
        last = len(network.blocks) - 1
        below, top = network.blocks[-2:]
        merged = weighted(below, top, mka_share(similarity, last - 1, last))
        network = network.with_blocks([*network.blocks[:-2], merged])
    return network


def shares(influence: Tensor) -> list[float]:
    """Return each member's share of the merged block: its Block Influence over the group's.

    This is CoMe's rule (arXiv 2510.15304). Shares are equal if no member has any influence.
    """
    influence = influence.clamp_min(0)
    if influence.sum() > 0:
        return (influence / influence.sum()).tolist()
    return [1 / len(influence)] * len(influence)


def quotas(share: list[float], n: int) -> list[int]:
    """Return how many of n units each member keeps: its share, rounded down.

    The member of the largest share takes what remains.
    """
    counts = [math.floor(n * part) for part in share]
    counts[share.index(max(share))] += n - sum(counts)
    return counts


def sensitivity(sizes: Tensor, weight: Tensor) -> Tensor:
    """Return E|u_c| * sum over outputs of |W[:, c]|, (F,): CoMe's channel sensitivity.

    It is the size of an input channel times the L1 norm of what reads it. `sizes` (F,) is E|u_c|,
    `weight` is (C, F).
    """
    return sizes * weight.to(sizes).abs().sum(0)


def concatenated(members: list[Weights], heads: list[Tensor], channels: list[Tensor],
                 share: list[float], config: Config) -> Weights:
    """Return one block of the chosen KV heads and channels of each member, laid side by side.

    KV heads come with the query heads they serve. Norms are the members' mean, not folded into
    anything, as in CoMe; q_norm and k_norm are averaged by share.
    """
    D = config.head_dim
    queries = [channels_of(query_heads_of(kept, config.n_rep), D) for kept in heads]
    keys = [channels_of(kept, D) for kept in heads]
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys,
            "gate_proj": channels, "up_proj": channels}
    columns = {"o_proj": queries, "down_proj": channels}
    equal = [1 / len(members)] * len(members)
    merged = {}
    for name in members[0]:
        tensors, part = [member[name] for member in members], name.split(".")[-2]
        if part in rows:
            chosen = [t[kept] for t, kept in zip(tensors, rows[part], strict=True)]
            merged[name] = torch.cat(chosen)
        elif part in columns:
            chosen = [t[:, kept] for t, kept in zip(tensors, columns[part], strict=True)]
            merged[name] = torch.cat(chosen, dim=1)
        else:
            weights = share if part in ("q_norm", "k_norm") else equal
            mean = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
            merged[name] = mean.to(tensors[0].dtype)
    return merged


def come_scores(members: list[Weights], xs: Tensor,
                text: Calibration) -> tuple[list[Tensor], list[Tensor]]:
    """Return the sensitivities of each member's KV heads, and those of its channels.

    xs (N, T, C) are the streams that enter the first member; they stay as they are.
    """
    heads, channels, runner = [], [], text.runner
    KV, ys = runner.config.num_key_value_heads, xs.clone()
    for weights in members:
        block = runner.block(weights)
        sizes = head_sizes(block, ys, runner).cpu()
        scores = sensitivity(sizes, weights["self_attn.o_proj.weight"])
        heads.append(scores.view(KV, -1).mean(1))
        runner.attend(weights, ys)
        sizes = channel_sizes(block, ys, runner).cpu()
        channels.append(sensitivity(sizes, weights["mlp.down_proj.weight"]))
        runner.feed(weights, ys)
    text.passes += len(members) / text.depth
    return heads, channels


def channel_sizes(block: Block, xs: Tensor, runner: Runner) -> Tensor:
    """Return E|psi_c| for each MLP channel, (F,); psi is what the channels hand to down_proj.

    xs are streams that have passed the block's attention.
    """
    def handed_on(x: Tensor) -> list[Tensor]:
        return [block.mlp.channels(block.post_attention_layernorm(x)).abs()]
    return runner.sums([xs], handed_on)[0] / count(xs)


def pick(scores: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Return the indices of each member's largest scores, ascending, as many as `counts` says."""
    return [best(score, count) for score, count in zip(scores, counts, strict=True)]


def come_merge(members: list[Weights], share: list[float], heads: list[Tensor],
               channels: list[Tensor], config: Config) -> Weights:
    """Return one block with each member's share of heads and channels, the most sensitive ones."""
    return concatenated(members, pick(heads, quotas(share, config.num_key_value_heads)),
                        pick(channels, quotas(share, config.intermediate_size)), share, config)


def come(network: Network, n: int, text: Calibration, span: int = 2) -> Network:
    """Merge the pair whose ends are most alike, and measure again, n times (CoMe).

    Each member gives the share of its heads and channels that its Block Influence has in the
    pair's, so the width stays (arXiv 2510.15304). Ends are compared by the mean cosine over all
    tokens; in CoMe it is the last token's.
    """
    for _ in range(n):
        similarity = text.measure(network).similarity
        start = int(similarity.diagonal(span).argmax())
        members, above = network.blocks[start:start + span], network.blocks[start + span:]
        xs = text.run(network.blocks[:start], text.embedded(network))
        heads, channels = come_scores(members, xs, text)
        share = shares(block_influence(similarity)[start:start + span])
        merged = come_merge(members, share, heads, channels, network.config)
        network = network.with_blocks([*network.blocks[:start], merged, *above])
    return network


def come_posterior(network: Network, n: int, text: Calibration, steps: int = 20) -> Network:
    """Merge as CoMe does, but try shares of 0, 1/20, ..., 1 for the first member of a pair.

    The share with the least calibration loss is taken: CoMe's posterior variant.
    """
    for _ in range(n):
        similarity = text.measure(network).similarity
        start = int(similarity.diagonal(2).argmax())
        members, above = network.blocks[start:start + 2], network.blocks[start + 2:]
        xs = text.run(network.blocks[:start], text.embedded(network))
        heads, channels = come_scores(members, xs, text)
        xs = xs[:text.trials]
        options = [come_merge(members, [k / steps, 1 - k / steps], heads, channels, network.config)
                   for k in range(steps + 1)]
        losses = [text.loss(network, text.run([merged, *above], xs.clone())) for merged in options]
        merged = options[losses.index(min(losses))]
        network = network.with_blocks([*network.blocks[:start], merged, *above])
    return network
