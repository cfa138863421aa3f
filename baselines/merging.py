"""Make one block out of several by arithmetic on their weights, or by picking heads and channels from each."""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from baselines.dropping import block_influence
from baselines.network import Calibration, Network
from checkpoint.config import Config
from checkpoint.reader import Weights
from prune import best, channels_of, query_heads_of

THRESHOLDS = [0.95 - 0.05 * k for k in range(20)] + [-1.0]  # of similarity, from strict to anything goes


def differences(blocks: list[Weights]) -> Weights:
    """theta_1 + sum_k (theta_k - theta_1): the first block plus what the others differ from it by (LaCo, eq. 1-2)."""
    first = blocks[0]
    return {name: (first[name].double() + sum(block[name].double() - first[name].double() for block in blocks[1:]))
            .to(first[name].dtype) for name in first}


def top_with_bottom_norms(blocks: list[Weights]) -> Weights:
    """The last block's matrices with the first block's norms: what LaCo's released code computes.

    It changes the first block in place while it takes differences to it, so that their sum telescopes to the last block.
    """
    return blocks[-1] | {name: tensor for name, tensor in blocks[0].items() if "layernorm" in name}


def final_cosine(a: Tensor, b: Tensor) -> float:
    """Mean over windows of the cosine of two streams (N, T, C), each window flattened into one vector."""
    return float(torch.cosine_similarity(a.flatten(1).double(), b.flatten(1).double()).mean())


def collapse(network: Network, first: int, last: int, merge: Callable[[list[Weights]], Weights]) -> Network:
    """The network with blocks first..last merged into one."""
    blocks = network.blocks
    return network.with_blocks([*blocks[:first], merge(blocks[first:last + 1]), *blocks[last + 1:]])


def laco(network: Network, n: int, text: Calibration, merge: Callable[[list[Weights]], Weights], span: int = 3) -> Network:
    """Walk down from the top and collapse `span` blocks into one wherever the final stream stays similar enough
    (LaCo, arXiv 2402.11187, Alg. 1), until n blocks are gone.

    The threshold of the paper is set by hand for each model; here it is the strictest of a list that removes n. Its interval
    is 1; a merge at the top, or the last one, may be of fewer blocks. Streams are compared before the final norm.
    """
    target = text.run(network.blocks, text.embedded(network, trial=True))
    for threshold in THRESHOLDS:
        current, left, low = network, n, len(network.blocks) - 1
        while left and (low := low - 1) >= 0:
            last = min(low + min(span - 1, left), len(current.blocks) - 1)
            if last > low:
                candidate = collapse(current, low, last, merge)
                if final_cosine(text.run(candidate.blocks, text.embedded(network, trial=True)), target) > threshold:
                    current, left = candidate, left - (last - low)
        if not left:
            return current
    raise ValueError(f"LaCo found no way to remove {n} of {len(network.blocks)} blocks")


def laco_paper(network: Network, n: int, text: Calibration) -> Network:
    """LaCo by the formula of its paper."""
    return laco(network, n, text, differences)


def laco_released(network: Network, n: int, text: Calibration) -> Network:
    """LaCo as its released code computes it: a merge keeps the top block's matrices."""
    return laco(network, n, text, top_with_bottom_norms)


def sliding_window_merging(network: Network, n: int, text: Calibration) -> Network:
    """Let a window grow downwards while the model with it collapsed stays similar, then collapse it and go on below
    (arXiv 2502.19159, Alg. 1); the strictest threshold of a list that removes n blocks. The last block is left alone.

    Collapsed by LaCo's formula. A window still open at the bottom is collapsed too.
    """
    target = text.run(network.blocks, text.embedded(network, trial=True))
    for threshold in THRESHOLDS:
        current, left, high = network, n, len(network.blocks) - 2
        while left and high > 0:
            low = high
            while low > 0 and high - low < left:
                candidate = collapse(current, low - 1, high, differences)
                if final_cosine(text.run(candidate.blocks, text.embedded(network, trial=True)), target) <= threshold:
                    break
                low -= 1
            if low < high:
                current, left = collapse(current, low, high, differences), left - (high - low)
            high = low - 1 if low < high else high - 1
        if not left:
            return current
    raise ValueError(f"Sliding-Window-Merging found no way to remove {n} of {len(network.blocks)} blocks")


def weighted(a: Weights, b: Weights, share: float) -> Weights:
    """share * a + (1 - share) * b, tensor by tensor, norms too."""
    return {name: (share * a[name].double() + (1 - share) * b[name].double()).to(a[name].dtype) for name in a}


def mka_share(similarity: Tensor, i: int, j: int, beta: float = 1.0) -> float:
    """Weight of block i when i and j merge: sigmoid(beta s_i / (s_i + s_j)), s the mean similarity of each to all.

    MKA (arXiv 2406.16330). As s_i is about s_j, this is always about 0.62.
    """
    s_i, s_j = float(similarity[i].mean()), float(similarity[j].mean())
    return 1 / (1 + math.exp(-beta * s_i / (s_i + s_j)))


def mka(network: Network, n: int, text: Calibration) -> Network:
    """n times the last two blocks become their weighted mean (MKA's pairwise merge, arXiv 2406.16330).

    Similarity here is the cosine of the blocks' outputs; the paper's is the mutual information of a diffusion map of them.
    """
    similarity = text.measure(network).similarity[1:, 1:]
    for _ in range(n):
        last = len(network.blocks) - 1
        share = mka_share(similarity, last - 1, last)
        network = collapse(network, last - 1, last, lambda pair, share=share: weighted(*pair, share))
    return network


def shares(influence: Tensor) -> list[float]:
    """Each member's share of the merged block: its Block Influence over the group's (CoMe, arXiv 2510.15304)."""
    influence = influence.clamp_min(0)
    return (influence / influence.sum()).tolist() if influence.sum() > 0 else [1 / len(influence)] * len(influence)


def quotas(share: list[float], n: int) -> list[int]:
    """How many of n units each member keeps: its share rounded down; the one of largest share takes what remains."""
    kept = [math.floor(n * part) for part in share]
    kept[share.index(max(share))] += n - sum(kept)
    return kept


def sensitivity(sizes: Tensor, weight: Tensor) -> Tensor:
    """E|u_c| * sum over outputs of |W[:, c]|, (F,): the size of an input channel times the L1 norm of what reads it.

    CoMe's channel sensitivity. sizes (F,) is E|u_c|, weight (C, F).
    """
    return sizes * weight.to(sizes).abs().sum(0)


def concatenated(members: list[Weights], heads: list[Tensor], channels: list[Tensor], share: list[float], config: Config,
                 ) -> Weights:
    """One block of the chosen KV heads (with the query heads they serve) and channels of each member, laid side by side.

    Norms are the members' mean, not folded into anything, as in CoMe; q_norm and k_norm are averaged by share.
    """
    D, n_rep = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    queries = [channels_of(query_heads_of(kept, n_rep), D) for kept in heads]
    keys = [channels_of(kept, D) for kept in heads]
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": channels, "up_proj": channels}
    columns = {"o_proj": queries, "down_proj": channels}
    merged = {}
    for name in members[0]:
        tensors, part = [member[name] for member in members], name.split(".")[-2]
        if part in rows:
            merged[name] = torch.cat([tensor[kept] for tensor, kept in zip(tensors, rows[part], strict=True)])
        elif part in columns:
            merged[name] = torch.cat([tensor[:, kept] for tensor, kept in zip(tensors, columns[part], strict=True)], dim=1)
        else:
            weights = share if part in ("q_norm", "k_norm") else [1 / len(members)] * len(members)
            merged[name] = sum(w * tensor.double() for w, tensor in zip(weights, tensors, strict=True)).to(tensors[0].dtype)
    return merged


def come_scores(members: list[Weights], xs: Tensor, text: Calibration) -> tuple[list[Tensor], list[Tensor]]:
    """Sensitivities of the KV heads and of the channels of each member, on the streams xs that enter the first."""
    heads, channels, runner = [], [], text.runner
    config, ys = runner.config, xs.clone()
    for weights in members:
        block = runner.block(weights)
        sizes = runner.head_sums(block, ys).cpu()
        heads.append(sensitivity(sizes, weights["self_attn.o_proj.weight"]).view(config.num_key_value_heads, -1).mean(1))
        runner.attend(weights, ys)
        channels.append(sensitivity(channel_sums(block, ys, runner), weights["mlp.down_proj.weight"]))
        runner.feed(weights, ys)
    text.passes += len(members) / text.depth
    return heads, channels


@torch.inference_mode()
def channel_sums(block, xs: Tensor, runner) -> Tensor:
    """Sum over tokens of |what each MLP channel hands to down_proj|, (F,), for streams xs that have passed attention."""
    total = torch.zeros(block.mlp.down_proj.in_features)

    def add(x: Tensor) -> Tensor:
        total.add_(block.mlp.channels(block.post_attention_layernorm(x)).abs().flatten(0, -2).float().sum(0).cpu())
        return x
    runner.update(xs, add)
    return total


def pick(scores: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Of each member the indices of so many of its largest scores, ascending."""
    return [best(score, count) for score, count in zip(scores, counts, strict=True)]


def come_merge(members: list[Weights], share: list[float], heads: list[Tensor], channels: list[Tensor], config: Config,
               ) -> Weights:
    """One block with each member's share of heads and channels, the most sensitive of each."""
    return concatenated(members, pick(heads, quotas(share, config.num_key_value_heads)),
                        pick(channels, quotas(share, config.intermediate_size)), share, config)


def come(network: Network, n: int, text: Calibration, span: int = 2) -> Network:
    """n times: merge the pair whose ends are most alike into one block, with as many heads and channels of each member
    as its Block Influence is of the pair's; then measure again (CoMe, arXiv 2510.15304).

    The skip score is the mean cosine over all tokens (CoMe: of the last token); width is preserved.
    """
    for _ in range(n):
        similarity = text.measure(network).similarity
        start = int(similarity.diagonal(span).argmax())
        members = network.blocks[start:start + span]
        xs = text.run(network.blocks[:start], text.embedded(network))
        heads, channels = come_scores(members, xs, text)
        share = shares(block_influence(similarity)[start:start + span])
        merged = come_merge(members, share, heads, channels, network.config)
        network = network.with_blocks([*network.blocks[:start], merged, *network.blocks[start + span:]])
    return network


def come_posterior(network: Network, n: int, text: Calibration, steps: int = 20) -> Network:
    """CoMe's posterior variant: the first member's share is the one of 0, 1/20, ..., 1 with the least calibration loss."""
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
        network = network.with_blocks([*network.blocks[:start], options[losses.index(min(losses))], *above])
    return network
