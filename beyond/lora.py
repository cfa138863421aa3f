"""LoRA (arXiv 2106.09685): train two thin matrices beside a frozen one, then add their product.

    y = W x + (alpha / rank) B A x          A (rank, in) is random, B (out, rank) starts at zero

So training starts at the model as it is, and ends in a matrix of the same shape.
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer

RANK, ALPHA = 8, 16  # the paper's rank; its authors' earlier code has this alpha
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(nn.Module):
    """A frozen linear layer with a low-rank correction, which is kept in float32."""

    def __init__(self, frozen: nn.Linear, generator: torch.Generator,
                 rank: int = RANK, alpha: float = ALPHA):
        super().__init__()
        self.frozen, self.scale = frozen, alpha / rank
        A = torch.randn(rank, frozen.in_features, generator=generator) / frozen.in_features ** 0.5
        device = frozen.weight.device
        self.A = nn.Parameter(A.to(device))                                 # (rank, in)
        self.B = nn.Parameter(torch.zeros(frozen.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x)
        correction = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)
        return y + (self.scale * correction).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Add the correction to the frozen weight, in place. Returns the layer."""
        weight = self.frozen.weight
        weight.copy_(weight.to(self.A.dtype) + self.scale * self.B @ self.A)
        return self.frozen


def projections(net: Transformer) -> Iterator[tuple[nn.Module, str]]:
    """Yield the seven projections of every block, each as the module that holds it and its name."""
    for block in net.model["layers"]:
        for part in (block.self_attn, block.mlp):
            yield from ((part, name) for name in PROJECTIONS if hasattr(part, name))


def add_lora(net: Transformer, seed: int) -> None:
    """Put a LoRA around every projection of a frozen model."""
    generator = torch.Generator().manual_seed(seed)
    for part, name in projections(net):
        setattr(part, name, LoRA(getattr(part, name), generator))


def merge_lora(net: Transformer) -> None:
    """Turn every LoRA into an ordinary layer that computes the same, up to its dtype's rounding."""
    for part, name in projections(net):
        if isinstance(layer := getattr(part, name), LoRA):
            setattr(part, name, layer.merged())
