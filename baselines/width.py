"""Keep every block and make all of them equally narrower, by as many parameters as n blocks have."""
from dataclasses import replace

import torch
from torch import Tensor

from baselines.network import Calibration, Network
from calibrate import Runner
from checkpoint.config import Config
from checkpoint.reader import Weights
from prune import best, channels_of, cut_channels, prune_attention, prune_mlp, query_heads_of, score_heads


def narrower(config: Config, n: int, biases: int = 0) -> tuple[int, int]:
    """(KV heads, channels) of every block so that the model loses at least the parameters of n of its L blocks.

    KV heads are the L - n of L rounded to a whole number, at least one; channels make up the rest. `biases` counts
    parameters that a method adds to each block.
    """
    L, C, D = config.num_hidden_layers, config.hidden_size, config.head_dim
    budget = config.block_parameters() * (L - n) // L - biases
    heads = max(1, round(config.num_key_value_heads * (L - n) / L))
    group = config.num_attention_heads // config.num_key_value_heads
    attention = heads * D * (2 * C * group + 2 * C + (group + 2 if config.qkv_bias else 0))
    norms = 2 * C + (2 * D if config.qk_norm else 0)
    channels = (budget - attention - norms) // (3 * C)
    if channels < 1:
        raise ValueError(f"{L} blocks cannot lose the parameters of {n} by width: nothing would remain of the MLPs")
    return heads, min(channels, config.intermediate_size)


def reshaped(network: Network, blocks: list[Weights], heads: int, channels: int, ordinary: bool = True) -> Network:
    """The network of these narrower blocks, with a config that says so."""
    group = network.config.num_attention_heads // network.config.num_key_value_heads
    made = network.with_blocks(blocks, ordinary=ordinary)
    return replace(made, config=replace(made.config, num_key_value_heads=heads, num_attention_heads=heads * group,
                                        intermediate_size=channels))


def uniform(network: Network, n: int, text: Calibration, ridge: float = 10.0) -> Network:
    """Every block keeps as many of its best heads and channels, scored and compensated as in FlattenGPT.

    The channel-pruning counterpart of the method; for the MLP it is MoDeGPT's type I (arXiv 2408.09632, sec. 3.2) with
    this project's ridge. Blocks from the bottom up, each on what the already narrowed ones produce.
    """
    (heads, channels), runner = narrower(network.config, n), text.runner
    xs, blocks = text.embedded(network), []
    for i, weights in enumerate(network.blocks):
        kept = best(score_heads(weights, xs, runner, f"block {i}"), heads)
        weights = prune_attention(weights, kept, network.config)
        runner.attend(weights, xs)
        weights, _, _ = cut_channels(weights, xs, runner, channels, ridge, f"block {i}")
        runner.feed(weights, xs)
        blocks.append(weights)
    text.passes += 1
    return reshaped(network, blocks, heads, channels)


@torch.inference_mode()
def moments(outputs, xs: Tensor, runner: Runner) -> tuple[Tensor, Tensor]:
    """Mean and variance over tokens of what `outputs` makes of the streams xs: (F,) each."""
    sums = squares = 0

    def add(x: Tensor) -> Tensor:
        nonlocal sums, squares
        u = outputs(x).flatten(0, -2).double()
        sums, squares = sums + u.sum(0), squares + u.square().sum(0)
        return x
    runner.update(xs, add)
    tokens = xs.shape[0] * xs.shape[1]
    mean = (sums / tokens).cpu()
    return mean, (squares / tokens).cpu() - mean.square()


def fluctuation(variance: Tensor, weight: Tensor) -> Tensor:
    """Var(u_c) * sum over outputs of W[:, c]^2, (F,): FLAP's weighted fluctuation (arXiv 2312.11983, eq. 5)."""
    return variance * weight.double().square().sum(0)


def mean_bias(mean: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """What the inputs that are not kept contribute on average, (C,): FLAP's bias compensation (eq. 7)."""
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[kept] = False
    return weight[:, gone].double() @ mean[gone]


def flap(network: Network, n: int, text: Calibration) -> Network:
    """FLAP with the same number of heads and channels in every block (its UL-UM setting; arXiv 2312.11983).

    Heads and channels of least fluctuation go and leave their mean behind as biases of o_proj and down_proj, which an
    ordinary LLaMA checkpoint does not have; so the result is evaluated in memory only.
    """
    config, runner = network.config, text.runner
    heads, channels = narrower(config, n, biases=2 * config.hidden_size)
    group = config.num_attention_heads // config.num_key_value_heads
    xs, blocks = text.embedded(network), []
    for weights in network.blocks:
        block, o_proj = runner.block(weights), weights["self_attn.o_proj.weight"]
        mean, variance = moments(lambda x, b=block: b.self_attn.heads(b.input_layernorm(x), runner.rope), xs, runner)
        kept = best(fluctuation(variance, o_proj).view(config.num_key_value_heads, -1).mean(1), heads)
        bias = mean_bias(mean, o_proj, channels_of(query_heads_of(kept, group), config.head_dim))
        weights = prune_attention(weights, kept, config) | {"self_attn.o_proj.bias": bias.to(o_proj.dtype)}
        runner.attend(weights, xs)
        block, down = runner.block(weights), weights["mlp.down_proj.weight"]
        mean, variance = moments(lambda x, b=block: b.mlp.channels(b.post_attention_layernorm(x)), xs, runner)
        kept = best(fluctuation(variance, down), channels)
        bias = mean_bias(mean, down, kept)
        weights = prune_mlp(weights, kept, down[:, kept]) | {"mlp.down_proj.bias": bias.to(down.dtype)}
        runner.feed(weights, xs)
        blocks.append(weights)
    text.passes += 1
    return reshaped(network, blocks, heads, channels, ordinary=False)
