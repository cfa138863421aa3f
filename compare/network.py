"""A model in memory, and calibration text that counts its passes: what all methods work on."""
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import calibrate
from checkpoint.config import Config
from checkpoint.reader import Weights
from console import progress
from evaluate import final_losses
from model import Runner, Transformer, embed, move


@dataclass(frozen=True, eq=False)  # equal only to itself: so it can be the key of a dictionary
class Network:
    """A model in memory. `config`, `block` and `outer` are those of a Checkpoint.

    So functions that read a checkpoint, such as `measure`, read a network as well.
    """
    config: Config
    blocks: list[Weights]
    outside: Weights          # embeddings, final norm, head unless tied
    absent: int = 0           # stored but not the model's: zeros for half blocks, shared copies
    ordinary: bool = True     # whether it can be saved as an ordinary checkpoint

    @classmethod
    def of(cls, source) -> "Network":
        """Read the model of a Checkpoint into memory."""
        blocks = [source.block(i) for i in range(source.config.num_hidden_layers)]
        return cls(source.config, blocks, source.outer())

    def block(self, i: int) -> Weights:
        """Return block i's tensors."""
        return self.blocks[i]

    def outer(self) -> Weights:
        """Return the tensors outside the blocks."""
        return self.outside

    def parameters(self) -> int:
        """Return how many numbers the model has, embeddings and head included."""
        stored = sum(tensor.numel() for weights in [*self.blocks, self.outside]
                     for tensor in weights.values())
        return stored - self.absent

    def with_blocks(self, blocks: list[Weights], absent: int = 0,
                    ordinary: bool = True) -> "Network":
        """Return the same embeddings and head around other blocks."""
        L = len(blocks)
        kinds = tuple(self.config.layer_types[:1]) * L
        config = replace(self.config, num_hidden_layers=L, layer_types=kinds, widths=(1,) * L)
        return replace(self, config=config, blocks=blocks, absent=absent, ordinary=ordinary)


class LinearMap(nn.Module):
    """Stand in for blocks: y = x + x M for the stream x (B, T, C) and M (C, C)."""

    def __init__(self, M: Tensor):
        super().__init__()
        self.weight = nn.Parameter(M, requires_grad=False)

    def forward(self, x: Tensor, *_) -> Tensor:
        return x + x @ self.weight


def module(weights: Weights, runner: Runner) -> nn.Module:
    """Return what maps a stream: a block, or the linear map that replaces some blocks."""
    if "linear.weight" in weights:
        return LinearMap(weights["linear.weight"].to(runner.device, runner.dtype))
    return runner.block(weights)


def whole(network: Network, runner: Runner) -> Transformer:
    """Return the network, ready to run."""
    outer = move(network.outside, runner.device, runner.dtype)
    blocks = [module(weights, runner) for weights in network.blocks]
    return Transformer(network.config, blocks, outer).eval().requires_grad_(False)


@torch.inference_mode()
def run(blocks: list[Weights], xs: Tensor, runner: Runner) -> Tensor:
    """Send streams xs (N, T, C) through blocks, in place. Returns xs."""
    for weights in blocks:
        step = module(weights, runner)
        runner.update(xs, lambda x, step=step: step(x, runner.rope))
    return xs


# network -> what was measured -> the result, and the seconds it took; forgets a network that nobody
# uses any more
Measured = WeakKeyDictionary[Network, dict[Hashable, tuple[Any, float]]]


class Calibration:
    """Windows of calibration text (N, T) and the few things that methods ask of them.

    Methods that search try many networks; they judge each by the first `trials` windows only.
    `passes` counts how often the whole text has gone through as many blocks as the dense model has.

    Calibrations of the same windows may share what they have `measured`. What was measured before
    still counts as passed, and its seconds are added to `saved`.
    """

    def __init__(self, tokens: Tensor, runner: Runner, depth: int, trials: int = 16,
                 measured: Measured | None = None):
        self.tokens, self.runner, self.depth, self.trials = tokens, runner, depth, trials
        self.measured = Measured() if measured is None else measured
        self.last = None               # the network measured last
        self.passes = self.saved = 0.0

    def once(self, network: Network, what: Hashable, measure: Callable[[], Any]) -> Any:
        """Return what measure() finds out about a network. It runs once for each name, `what`."""
        results = self.measured.setdefault(network, {})
        if what in results:
            self.saved += results[what][1]
        else:
            start = time.monotonic()
            results[what] = measure(), time.monotonic() - start
        return results[what][0]

    def measure(self, network: Network) -> calibrate.Measurement:
        """Measure a network as calibrate.measure does, in one pass at most; not twice in a row."""
        if self.last is network:
            return self.measured[network]["inputs"][0]
        self.last = network
        share = calibrate.windows_measured(*self.tokens.shape) / len(self.tokens)
        self.passes += len(network.blocks) * share / self.depth
        return self.once(network, "inputs",
                         lambda: calibrate.measure(network, self.tokens, self.runner))

    def embedded(self, network: Network, trial: bool = False) -> Tensor:
        """Return the stream (N, T, C) that enters the first block.

        It is that of all windows, or with trial=True of the trial windows only.
        """
        tokens = self.tokens[:self.trials] if trial else self.tokens
        return embed(network.outside, tokens, self.runner.dtype)

    def run(self, blocks: list[Weights], xs: Tensor) -> Tensor:
        """Send xs (N, T, C), the streams of all windows or some, through blocks, in place.

        Returns xs, and counts the passes.
        """
        self.passes += len(blocks) * len(xs) / len(self.tokens) / self.depth
        return run(blocks, xs, self.runner)

    def loss(self, network: Network, xs: Tensor) -> float:
        """Return the mean next-token loss for streams that leave the last block.

        xs (N, T, C) are those of all windows, or of the first ones.
        """
        tokens = self.tokens[:len(xs)]
        return float(final_losses(network.outside, xs, tokens, self.runner).double().mean())

    def losses_without(self, network: Network, steps: list[Callable[[Tensor], None]],
                       candidates: Sequence[int], size: float = 1.0,
                       score: Callable[[Tensor], float] | None = None) -> Tensor:
        """Return the loss of the network without each candidate step; infinity for other steps.

        `score` can take the place of the loss: a function of the streams that leave the last step.
        A step changes the streams in place, and counts as `size` blocks. What comes before a
        candidate is run once for all, so n steps cost about n / 2 passes of the trial windows.
        """
        score = score or partial(self.loss, network)
        losses = torch.full((len(steps),), math.inf, dtype=torch.float64)
        xs = self.embedded(network, trial=True)
        share = len(xs) / len(self.tokens) * size / self.depth
        last = max(candidates)
        for i in progress(range(last + 1), "try without each: steps", last + 1):
            if i in candidates:
                ys = xs.clone()
                for step in steps[i + 1:]:
                    step(ys)
                losses[i] = score(ys)
                self.passes += (len(steps) - i - 1) * share
            steps[i](xs)
            self.passes += share
        return losses
