"""What every method takes and returns: a model in memory; and calibration text that counts how often it is used."""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import calibrate
from calibrate import Runner, embed
from checkpoint.config import Config
from checkpoint.reader import Weights
from console import progress
from evaluate import final_losses
from model import Transformer, move


@dataclass(frozen=True)
class Network:
    """A model in memory with the face of a Checkpoint (config, block, outer), so that `measure` and the like take it."""
    config: Config
    blocks: list[Weights]
    outside: Weights          # embeddings, final norm, head unless tied
    absent: int = 0           # parameters that are stored as zeros, because a half of a block has been left out
    ordinary: bool = True     # whether it can be saved as an ordinary checkpoint

    @classmethod
    def of(cls, source) -> "Network":
        """The model of a Checkpoint."""
        return cls(source.config, [source.block(i) for i in range(source.config.num_hidden_layers)], source.outer())

    def block(self, i: int) -> Weights:
        """Block i's tensors."""
        return self.blocks[i]

    def outer(self) -> Weights:
        """The tensors outside the blocks."""
        return self.outside

    def parameters(self) -> int:
        """How many numbers the model has, embeddings and head included."""
        return sum(tensor.numel() for weights in [*self.blocks, self.outside] for tensor in weights.values()) - self.absent

    def with_blocks(self, blocks: list[Weights], absent: int = 0, ordinary: bool = True) -> "Network":
        """The same embeddings and head around other blocks."""
        kinds = tuple(self.config.layer_types[:1]) * len(blocks)
        config = replace(self.config, num_hidden_layers=len(blocks), layer_types=kinds, widths=(1,) * len(blocks))
        return replace(self, config=config, blocks=blocks, absent=absent, ordinary=ordinary)


class LinearMap(nn.Module):
    """Stands in for blocks: y = x + x M for the stream x (B, T, C) and M (C, C)."""

    def __init__(self, M: Tensor):
        super().__init__()
        self.weight = nn.Parameter(M, requires_grad=False)

    def forward(self, x: Tensor, *_) -> Tensor:
        return x + x @ self.weight


def module(weights: Weights, runner: Runner) -> nn.Module:
    """Something that maps a stream: a block, or the linear map that replaces some."""
    if "linear.weight" in weights:
        return LinearMap(weights["linear.weight"].to(runner.device, runner.dtype))
    return runner.block(weights)


def whole(network: Network, runner: Runner) -> Transformer:
    """The network, ready to run."""
    outer = move(network.outside, runner.device, runner.dtype)
    blocks = [module(weights, runner) for weights in network.blocks]
    return Transformer(network.config, blocks, outer).eval().requires_grad_(False)


class Calibration:
    """Windows of calibration text (N, T) and the few things that methods ask of them.

    Methods that search try many networks; they judge each by the first `trials` windows only.
    `passes` counts how often the whole text has gone through as many blocks as the dense model has. A network that has
    just been measured is not measured again.
    """

    def __init__(self, tokens: Tensor, runner: Runner, depth: int, trials: int = 16):
        self.tokens, self.runner, self.depth, self.trials, self.passes = tokens, runner, depth, trials, 0.0
        self.measured = None, None

    def measure(self, network: Network) -> calibrate.Measurement:
        """calibrate.measure of a network: similarities of all its streams, in one pass."""
        if self.measured[0] is not network:
            self.passes += len(network.blocks) / self.depth
            self.measured = network, calibrate.measure(network, self.tokens, self.runner)
        return self.measured[1]

    def embedded(self, network: Network, trial: bool = False) -> Tensor:
        """The stream (N, T, C) that enters the first block; of the trial windows only, if said."""
        return embed(network.outside, self.tokens[:self.trials if trial else None], self.runner.dtype)

    @torch.inference_mode()
    def run(self, blocks: list[Weights], xs: Tensor) -> Tensor:
        """xs (N, T, C), of all windows or some, through blocks, in place; counted."""
        for weights in blocks:
            step = module(weights, self.runner)
            self.runner.update(xs, lambda x, step=step: step(x, self.runner.rope))
        self.passes += len(blocks) * len(xs) / len(self.tokens) / self.depth
        return xs

    def loss(self, network: Network, xs: Tensor) -> float:
        """Mean next-token loss, for the streams that leave the last block, of all windows or of the trial windows."""
        return float(final_losses(network.outside, xs, self.tokens[:len(xs)], self.runner).double().mean())

    def losses_without(self, network: Network, steps: list[Callable[[Tensor], None]], candidates: list[int],
                       size: float = 1.0) -> Tensor:
        """Loss of the network without each candidate step (every step changes the streams in place); infinite for others.

        A step is `size` blocks. What comes before a candidate is run once for all, so n steps cost about n / 2 passes of
        the trial windows.
        """
        losses, xs = torch.full((len(steps),), math.inf, dtype=torch.float64), self.embedded(network, trial=True)
        share = len(xs) / len(self.tokens) * size / self.depth
        for i in progress(range(max(candidates) + 1), "try without each: steps", max(candidates) + 1):
            if i in candidates:
                ys = xs.clone()
                for step in steps[i + 1:]:
                    step(ys)
                losses[i] = self.loss(network, ys)
                self.passes += (len(steps) - i - 1) * share
            steps[i](xs)
            self.passes += share
        return losses
