"""What a run will take, computed before it starts: the formulas of docs/large-models.md.

All sizes are in bytes. `itemsize` is that of the dtype in which the run computes.
"""
import contextlib
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from checkpoint.config import Config

BATCH_TOKENS = 2048  # tokens that a block reads at a time
MOST_TOKENS = 2**14  # the same on a GPU, if memory allows
LIBRARIES = 5_000_000  # bytes that PyTorch and those under it keep, measured on a CPU
MARGIN = 1.2  # peaks that were measured are up to 1.15 times what is computed
ON_HOST = {"streams", "a few windows"}  # if the device has no room for them


def stream(config: Config, samples: int, length: int, itemsize: int = 4) -> int:
    """Return the size of one stream of all windows, N T C numbers."""
    return samples * length * config.hidden_size * itemsize


def writing(config: Config, together: int, length: int, itemsize: int) -> dict[str, int]:
    """Return what the model holds that writes `together` windows of text at a time."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return {"model": config.parameters() * itemsize,
            "keys and values": 2 * together * length * heads * config.head_dim * itemsize}


def batch(config: Config, samples: int, length: int, itemsize: int, width: int = 1) -> int:
    """Return the size of what a block of `width` members makes at a time.

    That is about three numbers for each token and channel of its MLP (and for a narrow dtype one in
    float32, to be summed), and four of the size of the stream.
    """
    channels, tokens = width * config.intermediate_size, min(max(BATCH_TOKENS, length),
                                                             samples * length)
    wider = 4 * channels if itemsize < 4 else 0
    return tokens * ((3 * channels + 4 * config.hidden_size) * itemsize + wider)


def measuring(config: Config, samples: int, length: int, itemsize: int,
              sample: int) -> dict[str, int]:
    """Return what the first pass holds, with `sample` tokens of each of the L + 1 streams."""
    kept = (config.num_hidden_layers + 1) * min(sample, samples * length)
    return {"streams": stream(config, samples, length, itemsize),
            "sample": kept * config.hidden_size * itemsize,
            "batch": batch(config, samples, length, itemsize), "libraries": LIBRARIES}


def evaluating(config: Config, samples: int, length: int, itemsize: int) -> dict[str, int]:
    """Return what an evaluation holds that reads block after block.

    Logits are for 1024 tokens at a time, about three numbers each, in float32.
    """
    return {"streams": stream(config, samples, length, itemsize),
            "block": config.block_parameters() * itemsize,
            "head": config.vocab_size * (config.hidden_size * itemsize + 3 * 4 * 1024),
            "batch": batch(config, samples, length, itemsize), "libraries": LIBRARIES}


def flattening(config: Config, samples: int, length: int, itemsize: int,
               width: int) -> dict[str, int]:
    """Return what it takes to flatten a group of `width` blocks."""
    return {"streams": stream(config, samples, length, itemsize),
            "wide block": width * config.block_parameters() * itemsize,
            "batch": batch(config, samples, length, itemsize, width), "libraries": LIBRARIES}


def pruning(config: Config, samples: int, length: int, itemsize: int, width: int) -> dict[str, int]:
    """Return what it takes to flatten and prune a group of `width` blocks.

    C is in float32 over all n channels of the group. One such matrix is solved in float64, and
    prune.inverse_diagonal holds three times 256 columns of it. The batches came before that.
    """
    parts = flattening(config, samples, length, itemsize, width)
    n = width * config.intermediate_size
    solve = max(8 * n * (n + 3 * 256), parts.pop("batch"))
    return parts | {"statistics": 4 * n ** 2, "solve": solve}


def group_memory(groups: Path = Path("/sys/fs/cgroup"),
                 own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the bytes that the limits of containers and jobs still allow; infinity without any.

    Linux has them in files of control groups, version 2 or 1: of this process's own group and of
    those above it. What files are cached is not counted as used, for that memory can be had.
    """
    folders, free = {groups, groups / "memory"}, float("inf")
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            known = kinds == "" or "memory" in kinds.split(",")
            while known and path.strip("/") and ".." not in path.split("/"):  # else not seen here
                folders.add(groups / kinds / path.strip("/"))
                path = path.rpartition("/")[0]
    for folder, name in product(folders, ("memory.max", "memory.high", "memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            limit = int((folder / name).read_text())
            stat = (folder / "memory.stat").read_text().split()
            used = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
            free = min(free, limit - used.get("anon", used.get("total_rss", 0)))
    return max(free, 0)


def free_memory(device: str) -> float:
    """Return the bytes that can be had on a device; infinity where the system does not say.

    Processes that torchrun has started on this machine share its memory.
    """
    share = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # what PyTorch keeps for later is free
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return min(int(line.split()[1]) * 1024, group_memory()) / share
    except OSError:
        pass
    return float("inf")


def fits(needs: dict[str, int], device: torch.device) -> bool:
    """Tell whether a device has room for all of this, and for a margin."""
    return sum(needs.values()) * MARGIN <= free_memory(device)


def batch_tokens(config: Config, device: torch.device, itemsize: int) -> int:
    """Return how many tokens a device reads at a time, for blocks of two members.

    From BATCH_TOKENS to MOST_TOKENS, as many as take a sixteenth of the free memory.
    """
    if device.type == "cpu":
        return BATCH_TOKENS
    fitting = free_memory(device) / 16 // batch(config, 1, 1, itemsize, width=2)
    return int(min(max(fitting, BATCH_TOKENS), MOST_TOKENS))


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
