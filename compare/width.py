"""Keep every block, and make all equally narrower: by as many parameters as n blocks have."""
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from beyond.refit import Fit, channel_features, head_features
from beyond.regression import RIDGE
from checkpoint.config import Config
from checkpoint.reader import Weights
from compare.dropping import half_of, without_halves
from compare.network import Calibration, Network
from flatten import merge_groups
from model import Runner
from prune import (
    best,
    channels_of,
    prune_attention,
    prune_channels,
    prune_mlp,
    query_heads_of,
    score_heads,
)


def narrower(config: Config, n: int, biases: int = 0) -> tuple[int, int]:
    """Return how many KV heads and channels each block keeps.

    The model then loses at least the parameters of n of its L blocks. Of the KV heads (L - n) / L
    stay, rounded as by round(), at least one; channels make up the rest, at most those there are.
    `biases` is the number of parameters that a method adds to each block. ValueError if no channel
    would remain.
    """
    L, C, D = config.num_hidden_layers, config.hidden_size, config.head_dim
    budget = config.block_parameters() * (L - n) // L - biases
    heads = max(1, round(config.num_key_value_heads * (L - n) / L))
    n_rep = config.n_rep
    attention = heads * D * (2 * C * n_rep + 2 * C + (n_rep + 2 if config.qkv_bias else 0))
    norms = 2 * C + (2 * D if config.qk_norm else 0)
    channels = (budget - attention - norms) // (3 * C)
    if channels < 1:
        raise ValueError(f"{L} blocks cannot lose the parameters of {n} by width: nothing would "
                         "remain of the MLPs; remove less")
    return heads, min(channels, config.intermediate_size)


def reshaped(network: Network, blocks: list[Weights], heads: int, channels: int,
             ordinary: bool = True) -> Network:
    """Return the network of these narrower blocks, with a config that says so."""
    made = network.with_blocks(blocks, ordinary=ordinary)
    config = replace(made.config, num_key_value_heads=heads,
                     num_attention_heads=heads * made.config.n_rep, intermediate_size=channels)
    return replace(made, config=config)


def narrowed(network: Network, text: Calibration, attention: Callable,
             mlp: Callable) -> list[Weights]:
    """Prune every block by itself, from the bottom up, on what the pruned ones below produce."""
    alone, xs = [[i] for i in range(len(network.blocks))], text.embedded(network)
    merged = merge_groups(network, alone, xs, text.runner, attention, mlp)
    text.passes += 1
    return [block for block, _ in merged]


def uniform(network: Network, n: int, text: Calibration, ridge: float = 10.0) -> Network:
    """Keep each block's best heads and channels, scored and compensated as in FlattenGPT.

    It is the method's counterpart that prunes width alone. For the MLP it is MoDeGPT's type I
    (arXiv 2408.09632, sec. 3.2) with this project's ridge.
    """
    (heads, channels), runner = narrower(network.config, n), text.runner

    def attention(members: list[Weights], xs: Tensor) -> tuple[Weights, dict]:
        kept = best(score_heads(members[0], xs, runner), heads)
        return prune_attention(members[0], kept, network.config), {}

    def mlp(block: Weights, xs: Tensor) -> tuple[Weights, dict]:
        return prune_channels(block, xs, runner, ridge, keep=channels)
    return reshaped(network, narrowed(network, text, attention, mlp), heads, channels)


def refit(network: Network, n: int, text: Calibration, ridge: float = RIDGE) -> Network:
    """Keep each block's best heads and channels by our fit: its elimination and its regressions.

    The target of each half block is the dense model's stream after it. So this is our fit without
    its flattening: it says what depth costs.
    """
    keep = narrower(network.config, n)
    fit = Fit(text.embedded(network), text.runner, ridge, keep=keep)
    text.passes += 1  # of the dense stream
    return reshaped(network, narrowed(network, text, fit.attention, fit.mlp), *keep)


def attentions_to_drop(config: Config, n: int, attention: int, balance: float = 1.5) -> int:
    """Return how many attentions 2SSP leaves out of a model that is to lose n of its L blocks.

    L r^(F / (a balance)), rounded, for r = n / L, attentions of a parameters and MLPs of F (arXiv
    2501.17771, stage balance). Where MLPs are small, that can be more than must go in all;
    then only as many go as fit into it.
    """
    L, block = config.num_hidden_layers, config.block_parameters()
    wanted = round(L * (n / L) ** ((block - attention) / (attention * balance)))
    return min(wanted, n * block // attention)


def norms_over_tokens(features: Callable, xs: Tensor, runner: Runner) -> Tensor:
    """Return the norm of each feature over the tokens of a window, summed over windows, (F,).

    `features` makes them, (B, T, F), of the streams xs (N, T, C).
    """
    return runner.sums([xs], lambda x: [features(x).norm(dim=1)])[0].cpu()


def two_stages(network: Network, n: int, text: Calibration) -> Network:
    """Make all MLPs equally narrower, then leave whole attentions out (2SSP, arXiv 2501.17771).

    Stage 1 keeps the channels of largest norm over tokens, as the dense model has them, and repairs
    nothing. Stage 2 leaves out the attention that costs the least calibration loss, as often as
    `attentions_to_drop` says. Together as many parameters go as n blocks have. What remains is no
    ordinary checkpoint if an attention is missing.
    """
    config, runner = network.config, text.runner
    attention = sum(tensor.numel() for name, tensor in network.blocks[0].items()
                    if half_of(name) == 0)
    drop = attentions_to_drop(config, n, attention)
    left = n * config.block_parameters() - drop * attention
    channels = config.intermediate_size - math.ceil(
        left / (3 * config.hidden_size * config.num_hidden_layers))
    if channels < 1:
        raise ValueError(f"2SSP cannot take the parameters of {n} blocks: nothing would remain of "
                         "the MLPs; remove less")
    xs, blocks = text.embedded(network), []
    for weights in network.blocks:
        runner.attend(weights, xs)
        kept = best(norms_over_tokens(channel_features(weights, runner), xs, runner), channels)
        runner.feed(weights, xs)
        blocks.append(prune_mlp(weights, kept, weights["mlp.down_proj.weight"][:, kept]))
    text.passes += 1
    narrow = reshaped(network, blocks, config.num_key_value_heads, channels)
    return without_halves(narrow, drop * attention, text, kinds=(0,))


def moments(features: Callable, xs: Tensor, runner: Runner) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance, (F,) each, of what `features` makes of the streams xs.

    Both are over all tokens.
    """
    def terms(x: Tensor) -> list[Tensor]:
        u = features(x).double()
        return [u, u.square()]
    sums, squares = runner.sums([xs], terms)
    tokens = xs.shape[0] * xs.shape[1]
    mean = (sums / tokens).cpu()
    return mean, (squares / tokens).cpu() - mean.square()


def fluctuation(variance: Tensor, weight: Tensor) -> Tensor:
    """Return Var(u_c) * sum over outputs of W[:, c]^2, (F,): FLAP's fluctuation (eq. 5)."""
    return variance * weight.double().square().sum(0)


def mean_bias(mean: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """Return what the inputs that are not kept add on average, (C,): FLAP's bias (eq. 7)."""
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[kept] = False
    return weight[:, gone].double() @ mean[gone]


def flap(network: Network, n: int, text: Calibration) -> Network:
    """Leave out the heads and channels of least fluctuation, the same number in every block.

    This is FLAP in its UL-UM setting (arXiv 2312.11983). What goes leaves its mean as a bias of
    o_proj or down_proj. An ordinary LLaMA checkpoint has no such biases, so the result is
    evaluated in memory only.
    """
    config, runner = network.config, text.runner
    heads, channels = narrower(config, n, biases=2 * config.hidden_size)

    def attention(members: list[Weights], xs: Tensor) -> tuple[Weights, dict]:
        o_proj = members[0]["self_attn.o_proj.weight"]
        mean, variance = moments(head_features(members[0], runner), xs, runner)
        scores = fluctuation(variance, o_proj).view(config.num_key_value_heads, -1).mean(1)
        kept = best(scores, heads)
        queries = channels_of(query_heads_of(kept, config.n_rep), config.head_dim)
        bias = mean_bias(mean, o_proj, queries).to(o_proj.dtype)
        pruned = prune_attention(members[0], kept, config)
        return pruned | {"self_attn.o_proj.bias": bias}, {}

    def mlp(weights: Weights, xs: Tensor) -> tuple[Weights, dict]:
        down = weights["mlp.down_proj.weight"]
        mean, variance = moments(channel_features(weights, runner), xs, runner)
        kept = best(fluctuation(variance, down), channels)
        bias = mean_bias(mean, down, kept).to(down.dtype)
        return prune_mlp(weights, kept, down[:, kept]) | {"mlp.down_proj.bias": bias}, {}
    blocks = narrowed(network, text, attention, mlp)
    return reshaped(network, blocks, heads, channels, ordinary=False)
