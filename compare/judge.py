"""Three numbers that say how good a compressed model is.

perplexity    of each judged text.
agreement     of what the dense model and this one write: the share of equal tokens. Both continue
              the same prompts greedily, and each reads what it wrote itself. A position counts if
              its two tokens are equal, whatever came before; the mean is over positions and
              prompts. No token ends a text early.
divergence    of its predictions q from the dense model's p: the mean of KL(p || q) over tokens, in
              nats.

Multiple choice alone hides models that cannot write any more.

Prompts and the windows for the divergence are from the first judged text. The judged windows are
cut into pieces of 32 tokens, of which 64, evenly spread, are prompts. The divergence is measured on
16 windows, evenly spread. Where there are fewer, all are taken.
"""
import math

import torch
from torch import Tensor

from compare.network import Network, run, whole
from evaluate import divergence, losses, readout
from model import Runner, Transformer, embed, generate

PROMPTS, PROMPT = 64, 32  # how many, and the tokens of each
WRITTEN = 32              # tokens that continue a prompt
COMPARED = 16             # windows on which predictions are compared


def spread(windows: Tensor, most: int) -> Tensor:
    """Return at most this number of the windows (N, T), evenly spread; all of them for 0."""
    if not 0 < most < len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, most).round().long()]


def prompts_of(windows: Tensor) -> Tensor:
    """Cut the windows (N, T) into prompts; return at most 64, evenly spread, (prompts, tokens)."""
    size = min(PROMPT, windows.shape[1])
    return spread(windows.unfold(1, size, size).flatten(0, 1), PROMPTS)


def legend(windows: Tensor) -> str:
    """Return one line for below a table: what agreement and divergence on these windows are."""
    prompts, compared = prompts_of(windows), spread(windows, COMPARED)
    return (f"agreement: share of the first {WRITTEN} greedily written tokens that are the dense "
            f"model's, after {len(prompts)} prompts of {prompts.shape[1]} tokens; divergence: KL "
            f"from its predictions, in nats a token, on {len(compared)} windows")


class Judge:
    """Judges networks by texts, and by how close they are to the dense one.

    What the dense one writes is made once, and so are its final streams. Its predictions are made
    from these each time, for they are large: a number for each entry of the vocabulary.
    """

    def __init__(self, dense: Network, texts: dict[str, Tensor], runner: Runner):
        first = next(iter(texts.values()))
        self.texts, self.runner = texts, runner
        self.prompts, self.windows = prompts_of(first), spread(first, COMPARED)
        self.written = self.writing(whole(dense, runner))
        self.dense, self.streams = dense, self.final_streams(dense)

    def writing(self, net: Transformer) -> Tensor:
        """Return what a model makes of the prompts, (prompts, WRITTEN)."""
        ids = generate(net, self.prompts.to(self.runner.device), WRITTEN)
        return ids[:, -WRITTEN:].cpu()

    def final_streams(self, network: Network) -> Tensor:
        """Return the streams (N, T, C) that leave the last block, for the windows to compare."""
        xs = embed(network.outside, self.windows, self.runner.dtype)
        return run(network.blocks, xs, self.runner)

    def divergence(self, network: Network) -> float:
        """Return how far the predictions are from the dense model's, in nats a token."""
        return divergence(readout(self.dense.outside, self.runner), self.streams,
                          readout(network.outside, self.runner), self.final_streams(network),
                          self.runner.device)

    def scores(self, network: Network) -> dict:
        """Return the three numbers, perplexity for each text. ValueError if one is not finite."""
        net, device = whole(network, self.runner), str(self.runner.device)
        perplexity = {name: math.exp(losses(net, windows, device).double().mean())
                      for name, windows in self.texts.items()}
        agreement = float((self.writing(net) == self.written).double().mean())
        divergence = self.divergence(network)
        if not all(map(math.isfinite, [*perplexity.values(), divergence])):
            raise ValueError("the perplexity or the divergence is not finite")
        return {"perplexity": perplexity, "agreement": agreement, "divergence": divergence}
