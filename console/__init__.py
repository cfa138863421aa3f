"""What a user of the scripts sees besides results: progress on long work, and one line when something is wrong."""
import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

INTERRUPTED = "interrupted"
NO_MEMORY = r"out of memory|can't allocate|(CUBLAS|CUSOLVER|CUDNN)_STATUS_ALLOC_FAILED"
LESS = {"--samples": "fewer --samples", "--length": "a smaller --length",
        "--window": "a smaller --window", "--stream": "--stream",
        "--max-group": "--max-group 2"}  # options that save memory
running = None  # the parser of the script that runs, which knows its options


def run(main: Callable[[], None]) -> None:
    """Run a script's main(): a user's mistake or an interruption becomes one line on stderr and exit code 2.

    Errors of the user are ValueError, OSError and running out of memory; anything else is a bug, and its traceback is
    shown. FLATTENGPT_TRACEBACK=1 shows all of them.
    """
    stopped = []

    def stop(number: int, frame) -> None:
        stopped.append(number)
        raise KeyboardInterrupt
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):  # a kill, or a lost connection, cleans up too
        signal.signal(getattr(signal, name), stop)
    try:
        main()
    except KeyboardInterrupt:
        fail(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has left
    except Exception as error:
        if stopped:  # the interruption surfaced inside a library, as an error of its own
            fail(INTERRUPTED)
        if not isinstance(error, ValueError | OSError | MemoryError | RuntimeError):
            raise
        out_of_memory = isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error))
        if os.environ.get("FLATTENGPT_TRACEBACK") or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        fail((memory_hint() if out_of_memory else "") + " ".join(str(error).split()))


def memory_hint() -> str:
    """The words before an error that means "not enough memory": which options need less of it."""
    known = re.findall(r"--[\w-]+", running.format_usage()) if running else []
    options = [what for option, what in LESS.items() if option in known]
    return f"not enough memory; try {' or '.join(options)}: " if options else "not enough memory: "


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A command-line parser whose --help ends with `epilog` as it stands, and whose errors are one line."""
    global running
    running = made = argparse.ArgumentParser(description=description, epilog=epilog,
                                             formatter_class=argparse.RawDescriptionHelpFormatter)
    made.error = lambda message: fail(f"{message}; {made.prog} --help shows what there is")
    return made


def fail(message: str) -> None:
    """Leave with one line on stderr and exit code 2."""
    print(f"\r\033[Kerror: {message}" if sys.stderr.isatty() else f"error: {message}", file=sys.stderr)
    sys.exit(2)


def progress(items: Iterable, what: str, total: int) -> Iterator:
    """Yield the items and keep a line on stderr: how many are done, seconds for each, time left."""
    start, last, live = time.monotonic(), 0.0, sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        spent = time.monotonic() - start
        # a terminal gets a line that changes; a log gets one line every half minute and the last
        if live or spent - last > 30 or (done == total and spent > 1):
            each, last = spent / done, spent
            print(f"{chr(13) if live else ''}{what} {done}/{total}   {each:.3g} s each   {each * (total - done):.0f} s left"
                  + (" \033[K" if live else ""), end="" if live else "\n", file=sys.stderr, flush=True)
    if live:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def command(script: str, **arguments) -> str:
    """The command that repeats a run, in full: python SCRIPT --name value ..., flags without value for True."""
    words = ["python", script]
    for name, value in arguments.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return shlex.join(words)
