"""What a run will take, computed before it starts: the formulas of docs/large-models.md.

All sizes are in bytes. `itemsize` is that of the dtype in which the run computes.
"""
import os
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoint.config import Config

MARGIN = 1.2  # peaks that were measured are up to 1.15 times what is computed
ON_HOST = {"streams", "a few windows"}  # whatever the device is


def stream(config: Config, samples: int, length: int, itemsize: int = 4) -> int:
    """Return the size of one stream of all windows, N T C numbers."""
    return samples * length * config.hidden_size * itemsize


def writing(config: Config, together: int, length: int, itemsize: int) -> dict[str, int]:
    """Return what the model holds that writes `together` windows of text at a time."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return {"model": config.parameters() * itemsize,
            "keys and values": 2 * together * length * heads * config.head_dim * itemsize}


def measuring(config: Config, samples: int, length: int, itemsize: int,
              sample: int) -> dict[str, int]:
    """Return what the first pass holds, with `sample` tokens of each of the L + 1 streams."""
    kept = (config.num_hidden_layers + 1) * min(sample, samples * length)
    return {"streams": stream(config, samples, length, itemsize),
            "sample": kept * config.hidden_size * itemsize}


def flattening(config: Config, samples: int, length: int, itemsize: int,
               width: int) -> dict[str, int]:
    """Return what it takes to flatten a group of `width` blocks."""
    return {"streams": stream(config, samples, length, itemsize),
            "wide block": width * config.block_parameters() * itemsize}


def pruning(config: Config, samples: int, length: int, itemsize: int, width: int) -> dict[str, int]:
    """Return what it takes to flatten and prune a group of `width` blocks.

    C is in float32 over all channels of the group, and one such matrix is solved in float64.
    """
    numbers = (width * config.intermediate_size) ** 2
    return flattening(config, samples, length, itemsize, width) | {
        "statistics": 4 * numbers, "solve": 8 * numbers}


def free_memory(device: str) -> float:
    """Return the bytes that can be had on a device; infinity where the system does not say.

    Processes that torchrun has started on this machine share its memory.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except OSError:
        pass
    return float("inf")


def largest_group(memory: Callable[[int], dict[str, int]], most: int, device: str) -> int:
    """Return how many blocks a group can have, from 2 to `most`, for the memory that is free.

    memory(width) says what a group of `width` blocks takes. A margin stays for what that leaves
    out. Two blocks are always tried.
    """
    elsewhere = ON_HOST if torch.device(device).type == "cuda" else set()
    free = free_memory(device) / MARGIN
    for width in range(most, 2, -1):
        if sum(size for name, size in memory(width).items() if name not in elsewhere) <= free:
            return width
    return 2


def row(what: str, parts: dict[str, int]) -> str:
    """Word the sum of the parts, and the parts."""
    each = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items())
    return f"memory, {what:12s} {sum(parts.values()) / 1e6:9,.0f} MB   ({each})"
