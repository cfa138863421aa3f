"""Prune heads and channels by the gradients of masks (Kwon et al. 2022, arXiv 2204.09656).

Every unit, a KV head with its query heads or an MLP channel, gets a mask m = 1 that multiplies what
it hands to o_proj or down_proj. To second order, setting masks to zero raises the loss by half the
square of the sum of their gradients, summed over texts (the empirical Fisher information).

1. mask search         keep the units of largest sum over texts of (dLoss/dm)^2
2. mask rearrangement  in each layer, exchange units so that the gradients of those that go cancel
3. mask tuning         give the units that stay the factors by which their layer comes closest to
                       the dense model's

The paper searches for the number of units in each layer; here it is the same in all, so that the
result is an ordinary checkpoint.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from beyond.refit import DOWN_PROJ, O_PROJ, channel_features, head_features
from beyond.regression import fit, means, ridged
from checkpoint.reader import Weights
from compare.network import Calibration, Network
from compare.width import narrower, reshaped
from evaluate import readout, window_losses
from model import batches, embed, symmetric
from prune import prune_attention, prune_mlp

RIDGE = 0.01  # of the tuning, in mean eigenvalues: enough for units that move together


def mask_gradients(network: Network, text: Calibration) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of the masks of each block's KV heads (N, KV), and channels (N, F).

    A row is of one window's mean loss.
    """
    runner, heads, channels = text.runner, [], []
    logits_of = readout(network.outside, runner)
    for rows in batches(text.tokens):
        ids = text.tokens[rows].to(runner.device)
        x, masks = embed(network.outside, text.tokens[rows], runner.dtype).to(runner.device), []
        for weights in network.blocks:
            block = runner.block(weights).requires_grad_(False)
            z = block.self_attn.heads(block.input_layernorm(x), runner.rope)    # (B, T, H*D)
            kv_heads = network.config.num_key_value_heads
            masks.append(torch.ones(len(x), 1, kv_heads, 1, dtype=x.dtype, device=x.device,
                                    requires_grad=True))
            z = (z.unflatten(-1, (kv_heads, -1)) * masks[-1]).flatten(2)
            x = x + block.self_attn.o_proj(z)
            psi = block.mlp.channels(block.post_attention_layernorm(x))         # (B, T, F)
            masks.append(torch.ones_like(psi[:, :1], requires_grad=True))
            x = x + block.mlp.down_proj(psi * masks[-1])
        loss = window_losses(logits_of, x, ids).sum()
        found = [g.flatten(1).double().cpu() for g in torch.autograd.grad(loss, masks)]
        heads.append(found[::2])
        channels.append(found[1::2])
    text.passes += 3  # a backward pass costs about two forward passes
    return tuple([torch.cat(parts) for parts in zip(*batched, strict=True)]
                 for batched in (heads, channels))


def units_that_stay(gradients: Tensor, keep: int) -> Tensor:
    """Choose the units of a layer to keep, from the gradients of their masks (N, units).

    First those of largest diagonal Fisher information (the paper's mask search). Then, as in its
    mask rearrangement, every other unit is offered to go: it joins those that go, and of them all
    that one comes back without which the summed gradients are smallest.
    """
    order = gradients.square().sum(0).argsort(stable=True).tolist()
    gone = order[:len(order) - keep]
    for unit in order[len(gone):]:
        gone.append(unit)
        without_each = gradients[:, gone].sum(1, keepdim=True) - gradients[:, gone]
        del gone[int(without_each.square().sum(0).argmin())]
    return torch.tensor(sorted(set(order) - set(gone)))


def tuned(weights: Weights, name: str, features: Callable, xs: Tensor, target: Tensor, size: int,
          text: Calibration) -> Weights:
    """Scale each unit of `size` columns of o_proj or down_proj (`name`) so that the target is met.

    The factors s minimise E|sum_u s_u y_u - t|^2, where y_u is what unit u adds to the stream xs,
    and t is the target (N, T, C): the paper's mask tuning. A ridge pulls them to one; the released
    code stops if one leaves [-10, 10]. `features` makes what the columns read.
    """
    def terms(u: Tensor, t: Tensor) -> list:
        z = features(u)
        return [(z, z), (z, t)]
    A, B = means(text.runner, [xs, target], terms)
    W = weights[name].to(A).T                                               # (units*size, C)
    # <y_u, y_v> sums z_i z_j <W_i, W_j> over the rows i of unit u and j of unit v
    A = (symmetric(A) * (W @ W.T)).unflatten(0, (-1, size)).unflatten(2, (-1, size)).sum((1, 3))
    b = (B * W).sum(1).view(-1, size).sum(1)
    factors = fit(torch.ones_like(b)[:, None], b[:, None], *ridged(A, RIDGE))   # (units, 1)
    new = W * factors.repeat_interleave(size, dim=0)
    return weights | {name: new.T.to(weights[name]).contiguous()}


def kwon(network: Network, n: int, text: Calibration) -> Network:
    """Keep each block's best heads and channels by Fisher information, and tune their sizes.

    This is the framework of Kwon et al. (arXiv 2204.09656) with equal widths, as many parameters as
    n blocks are fewer.
    """
    config, runner = network.config, text.runner
    heads, channels = narrower(config, n)
    size = config.n_rep * config.head_dim
    dense, xs, blocks = text.embedded(network), text.embedded(network), []
    for weights, of_heads, of_channels in zip(network.blocks, *mask_gradients(network, text),
                                              strict=True):
        runner.attend(weights, dense)
        pruned = prune_attention(weights, units_that_stay(of_heads, heads), config)
        pruned = tuned(pruned, O_PROJ, head_features(pruned, runner), xs, dense - xs, size, text)
        runner.attend(pruned, xs)
        runner.feed(weights, dense)
        kept = units_that_stay(of_channels, channels)
        pruned = prune_mlp(pruned, kept, weights[DOWN_PROJ][:, kept])
        pruned = tuned(pruned, DOWN_PROJ, channel_features(pruned, runner), xs, dense - xs, 1, text)
        runner.feed(pruned, xs)
        blocks.append(pruned)
    text.passes += 2
    return reshaped(network, blocks, heads, channels)
