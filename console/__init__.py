"""What a user of the commands sees besides results: progress, and one line for an error."""
import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import parallel

INTERRUPTED = "interrupted"
NO_MEMORY = r"out of memory|can't allocate|(CUBLAS|CUSOLVER|CUDNN)_STATUS_ALLOC_FAILED"
LESS = {"--samples": "fewer --samples", "--length": "a smaller --length",
        "--window": "a smaller --window", "--stream": "--stream",
        "--max-group": "--max-group 2",  # options that save memory
        "--checkpointing": "--checkpointing"}
running = None  # the parser of the command that runs, which knows its options


def run(main: Callable[[], None], torchrun: str | None = None) -> None:
    """Run a command's main(). A user's mistake or an interruption leaves one line and exit code 2.

    Mistakes are ValueError, OSError and running out of memory. Anything else is a bug, whose
    traceback is shown. FLATTENGPT_TRACEBACK=1 shows all tracebacks. `torchrun` is that
    of parallel.start.
    """
    stopped = []

    def stop(number: int, frame) -> None:
        stopped.append(number)
        if len(stopped) == 1:  # further signals must not disturb the cleaning up
            raise KeyboardInterrupt
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        number = getattr(signal, name)
        nohup = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
        if not nohup:
            signal.signal(number, stop)  # a kill or a lost connection cleans up, too
    if isinstance(sys.stdout, io.TextIOWrapper):  # on Windows a file may lack a model's letters
        sys.stdout.reconfigure(errors="replace")
    try:
        parallel.start(torchrun)
        main()
        parallel.leave()
    except KeyboardInterrupt:
        fail(INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if stopped:  # the interruption surfaced inside a library, as an error of its own
            fail(INTERRUPTED)
        no_memory = isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error))
        mistake = no_memory or isinstance(error, ValueError | OSError)
        if not mistake or os.environ.get("FLATTENGPT_TRACEBACK"):
            raise
        fail((memory_hint() if no_memory else "") + " ".join(str(error).split()))


def cores() -> int:
    """Count the cores that this process may use. macOS and Windows tell only what there is."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_hint() -> str:
    """Word the hint that precedes an out-of-memory error: which options need less memory."""
    known = re.findall(r"--[\w-]+", running.format_usage()) if running else []
    hints = [hint for option, hint in LESS.items() if option in known]
    return f"not enough memory; try {' or '.join(hints)}: " if hints else "not enough memory: "


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Put the place in front of any ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """Make a command-line parser whose errors are one line. Its --help ends with `epilog`."""
    global running
    module = getattr(sys.modules["__main__"], "__spec__", None)  # set if started with python -m
    prog = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    running = made = argparse.ArgumentParser(prog=prog, description=description, epilog=epilog,
                                             formatter_class=argparse.RawDescriptionHelpFormatter)
    made.error = lambda message: fail(f"{message}; {made.prog} --help shows what there is")
    return made


def fail(message: str) -> None:
    """Leave with one line on stderr and exit code 2.

    Of several processes the first speaks at once. The others wait: what they have to say may be the
    same, and torchrun ends all when one has ended.
    """
    if parallel.rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if message == INTERRUPTED:
            sys.exit(2)
        time.sleep(10)
        message = f"process {parallel.rank()}: {message}"
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # a line of progress may stand there
    print(f"{clear}error: {message}", file=sys.stderr)
    sys.exit(2)


def progress(items: Iterable, what: str | Callable[[], str], total: int) -> Iterator:
    """Yield the items, and tell on stderr how many are done, seconds for each, and time left.

    `what` says of what, or is a function that says it anew each time. A terminal gets one line that
    changes. A log gets a line every half minute, and the last. Of several processes the first
    tells.
    """
    if parallel.rank():
        yield from items
        return
    start, last, live = time.monotonic(), 0.0, sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        spent = time.monotonic() - start
        each = spent / done
        name = what() if callable(what) else what
        line = f"{name} {done}/{total}   {each:.3g} s each   {each * (total - done):.0f} s left"
        if live:
            print(f"\r{line} \033[K", end="", file=sys.stderr, flush=True)
        elif spent - last > 30 or (done == total and spent > 1):
            last = spent
            print(line, file=sys.stderr, flush=True)
    if live:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def command(script: str, **arguments) -> str:
    """Write out the command that repeats a run: python SCRIPT --name value ...

    SCRIPT is a file, or "-m" and a module.

    An argument that is True becomes a flag without value, and a list several values. None and
    False leave it out.
    """
    words = ["python", *script.split()]
    for name, value in arguments.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)
