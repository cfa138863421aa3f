"""Several processes that share the work. Each has some of the windows, and sums are over all.

    torchrun --nproc_per_node 2 flatten.py --ckpt PATH        starts two, one for each GPU

All of them have the same sums, so they choose the same heads and channels and make the same blocks.
Process 0 alone writes and prints. Without torchrun there is one process, and every function here
gives back what it gets.
"""
import atexit
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor


def start(together: bool = True) -> None:
    """Take a GPU of one's own, if torchrun has started several processes, and meet the others.

    If they do not work together, each goes on as if it were alone.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what --device cuda means from now on
    if together:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Return how many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items):
    """Return this process's share of items, a sequence or a tensor (N, ...): every ranks-th.

    It is empty if there are too few for all.
    """
    return items[rank()::ranks()]


def total(value):
    """Return the sum of a value over all processes. A tensor is summed in place.

    ConnectionError if another process has ended.
    """
    if ranks() == 1:
        return value
    kinds = {int: torch.int64, float: torch.float64}
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=kinds[type(value)])
    try:
        dist.all_reduce(tensor)
    except RuntimeError:
        raise ConnectionError("another process of this run has ended; its own line says why, or it "
                              "was killed (most often for memory)") from None
    return tensor if tensor is value else type(value)(tensor)


def whole(values: Tensor) -> Tensor:
    """Return what all processes have, (N, ...), in the order from which `share` took each part."""
    everything = values.new_zeros(total(len(values)), *values.shape[1:])
    everything[rank()::ranks()] = values
    return total(everything)
