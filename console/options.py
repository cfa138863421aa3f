"""The options that commands share, their defaults, and the record that lets a run be repeated."""
import argparse
import functools
import hashlib
import math
import os
import platform
import sys
from importlib.metadata import version

import torch
from torch import Tensor

import parallel
from console import command, cores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAPER = {"samples": 128, "length": 2048, "seed": 0, "ridge": 10.0}


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --dtype."""
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="to compute in (default: as stored on a GPU, float32 on a CPU)")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every run over calibration text.

    They are None unless given; `defaults` fills them in.
    """
    parser.add_argument("--data", nargs="+",
                        help="calibration text: a folder with wiki.*.raw, a .raw/.txt file, the "
                             "WikiText-2 zip, 'python' for Python's own library, or 'self' for "
                             "text that the model, whole in memory, writes once (default: "
                             "WikiText-2, downloaded once). Several texts give equal shares of the "
                             "windows, one named twice a double share; what judges is the held-out "
                             "part of the first that is not 'self'")
    parser.add_argument("--samples", type=int, help="windows of calibration text (default 128)")
    parser.add_argument("--length", type=int, help="tokens in a window (default 2048)")
    parser.add_argument("--seed", type=int, help="which windows (default 0)")
    add_device_options(parser)


def defaults(args: argparse.Namespace, preferred: dict | None = None) -> None:
    """Fill in the options that were not given, from `preferred` or else with the paper's values.

    One calibration text, a string, becomes a list of one. ValueError for impossible values.
    """
    for name, value in (PAPER | (preferred or {})).items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    if isinstance(args.data, str):
        args.data = [args.data]
    counts = args.samples, args.length, args.seed
    if not all(type(value) is int for value in counts):
        raise ValueError(f"samples, length and seed must be integers; got {counts}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be between 0 and 2^63; got {args.seed}")
    ridge = getattr(args, "ridge", 1.0)
    if not isinstance(ridge, int | float) or not 0 < ridge < math.inf:
        raise ValueError(f"--ridge must be a positive number; got {ridge}")
    if args.samples < 1 or args.length < 2:
        raise ValueError("--samples must be at least 1 and --length at least 2; "
                         f"got {args.samples} and {args.length}")


def compute_dtype(name: str | None, device: str, stored: torch.dtype,
                  solves: bool = False) -> torch.dtype:
    """Return the dtype to compute in: the named one, else the stored one, on a CPU float32.

    ValueError for a device that cannot be used. `solves`: the command solves equations there, which
    takes float64. A device without it, such as mps, can still evaluate.
    """
    try:
        float(torch.ones(1, device=device, dtype=torch.float64 if solves else torch.float32))
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason})") from None
    if parallel.ranks() > 1 and torch.device(device).index is not None:
        raise ValueError(f"--device {device} is one device for {parallel.ranks()} processes; give "
                         f"{torch.device(device).type}, and each takes one of its own")
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        note_threads()
    if name:
        return DTYPES[name]
    return torch.float32 if on_cpu else stored


@functools.cache  # one line a run is enough
def note_threads() -> None:
    """Say so, once, on stderr if there are more threads than cores: they wait for each other.

    The threads are those of all processes that torchrun has started on this machine.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads, most = processes * torch.get_num_threads(), cores()
    if threads > most and parallel.rank() == 0:
        advice = f"set OMP_NUM_THREADS={max(1, most // processes)}"
        advice = advice if processes <= most else f"start at most {most} process(es)"
        print(f"note: {threads} threads on {most} core(s) are slow; {advice}", file=sys.stderr)


def describe_run(script: str, args: argparse.Namespace, tokens: Tensor, text_name: str,
                 dtype: torch.dtype, **flags) -> dict:
    """Describe a run for flatten.json: settings, calibration text, versions, the command.

    `flags` are options that belong to the command and not to the settings.
    """
    names = ("samples", "length", "seed", "ridge", "max_group", "data")
    settings = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if args.data and len(args.data) == 1:
        settings["data"] = args.data[0]  # one text is recorded by its name alone, several as a list
    settings["dtype"] = str(dtype).removeprefix("torch.")
    options = {name.replace("_", "-"): value for name, value in (settings | flags).items()}
    ids = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return {"settings": settings, "device": torch.device(args.device).type,
            "calibration": {"text": text_name, "sha256_of_ids": ids},
            "versions": {"python": platform.python_version(), "torch": version("torch"),
                         "safetensors": version("safetensors")},
            "command": command(script, ckpt=args.ckpt, **options)}
