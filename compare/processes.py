"""Measure how much faster several processes are than one: python -m compare.processes

Each has one thread, so at least as many cores must be free. The paper's method and the fit, both
with groups by similarity, are run on the bundled model, by one process and by several in turn,
without evaluation. What a --dry-run of the same command takes is the start of Python and PyTorch,
and is subtracted.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import console

ROOT = Path(__file__).parent.parent


def seconds(command: list[str]) -> float:
    """Return how long a command takes, with one thread for each process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - start


def main() -> None:
    parser = console.parser("Time flattening by one process and by several.", __doc__)
    parser.add_argument("--processes", type=int, default=2, help="default %(default)s")
    parser.add_argument("--samples", type=int, default=256, help="windows (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3,
                        help="runs; their median counts (default %(default)s)")
    args = parser.parse_args()
    if args.processes < 2 or args.repeats < 1:
        raise ValueError("--processes must be at least 2, and --repeats at least 1")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.processes)]
    print(f"{args.samples} x 256 tokens, bundled model, one thread a process, {console.cores()} "
          f"cores, medians of {args.repeats}")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--ckpt", "demo/checkpoint", "--data", "python", "--samples", str(args.samples),
                   "--length", "256", "--no-eval", "--overwrite", "--out", f"{folder}/out"]
        for script in ["flatten.py"], ["-m", "beyond.refit", "--group-by", "similarity"]:
            alone, together = [], []
            for _ in range(args.repeats):
                for launcher, times in ([], alone), (launch, together):
                    command = [*launcher, *script, *options]
                    times.append(seconds(command) - seconds([*command, "--dry-run"]))
            one, several = statistics.median(alone), statistics.median(together)
            print(f"{' '.join(script):39s} one process {one:6.2f} s   {args.processes} processes "
                  f"{several:6.2f} s   ratio {one / several:.2f}")


if __name__ == "__main__":
    console.run(main)
