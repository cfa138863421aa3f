"""Run code that is not ours in a process of its own, and end it and whatever it has started."""
import contextlib
import os
import signal
import subprocess
from pathlib import Path


def run(command: list, seconds: float, env: dict[str, str], cwd: Path | None = None,
        stderr=subprocess.DEVNULL) -> int:
    """Run a command with more variables in its environment. Returns its exit code.

    What it prints is thrown away. ValueError if it does not end within `seconds`.
    """
    process = subprocess.Popen([*map(str, command)], cwd=cwd, env=os.environ | env, stderr=stderr,
                               start_new_session=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(f"stopped after {seconds:.0f} s") from None
    finally:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows has no sessions
            process.kill()
        process.wait()
