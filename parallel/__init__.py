"""Several processes that share the work. Each has some of the windows, and sums are over all.

    torchrun --nproc_per_node 2 flatten.py --ckpt PATH        starts two, one for each GPU

All of them have the same sums, so they choose the same heads and channels and make the same blocks.
Process 0 alone writes and prints. Without torchrun there is one process, and every function here
gives back what it gets.

`total`, `whole` and `agree` wait for the other processes. So do all functions that use them: every
process must call them, in the same order.
"""
import atexit
import os
import sys
import zlib
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def started() -> tuple[int, int]:
    """Return the number of this process and of all, as torchrun has started them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(torchrun: str | None) -> None:
    """Take a GPU of one's own, if torchrun has started several processes, and meet the others.

    `torchrun` says whether they work "together" or "apart", as if each were alone. ValueError if
    the command, for which it is None, is for one process only.
    """
    if started()[1] == 1:
        return
    if torchrun is None:
        raise ValueError("this command is for one process; start it without torchrun")
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)  # what --device cuda now means
    if torchrun == "together":
        # torchrun ends all when one has ended; a slow one, which writes, may take its time
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo",
                                timeout=timedelta(days=1))
        atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process


def leave() -> None:
    """End this process, if it works together with others, once all have done their work.

    Python's own way out is not taken: threads of gloo that still run abort it now and then.
    """
    if ranks() > 1:
        total(0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank() -> int:
    """Return the number of this process among those that work together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """Return how many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence | Tensor) -> Sequence | Tensor:
    """Return this process's share of items, a sequence or a tensor (N, ...): every ranks-th.

    It is empty if there are too few for all.
    """
    return items[rank()::ranks()]


def total(value: int | float | Tensor) -> int | float | Tensor:
    """Return the sum of a value over all processes. A tensor is summed in place.

    ConnectionError if that fails, most often because another process has ended.
    """
    if ranks() == 1:
        return value
    kinds = {int: torch.int64, float: torch.float64}
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=kinds[type(value)])
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise ConnectionError("another process of this run has ended; its own line says why, or it "
                              "was killed, most often for memory "
                              f"({str(error).splitlines()[0][:80]})") from None
    return tensor if tensor is value else type(value)(tensor)


def whole(values: Tensor) -> Tensor:
    """Return what all processes have, (N, ...), in the order from which `share` took each part."""
    everything = values.new_zeros(total(len(values)), *values.shape[1:])
    everything[rank()::ranks()] = values
    return total(everything)


def agree(choice, what: str) -> None:
    """ValueError if the processes have not all made the same choice, a list of whole numbers."""
    code = zlib.crc32(repr(choice).encode())
    if total(code) != ranks() * code:
        raise ValueError(f"the processes chose different {what}, for they round differently; "
                         "use GPUs or machines of one kind, or one process")
