import os
import sys

import pytest
import tiny
import torch

import console

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(min(int(os.environ.get("OMP_NUM_THREADS", 2)), console.cores()))


@pytest.fixture
def ckpt(tmp_path):
    """A tiny random checkpoint."""
    return tiny.checkpoint(tmp_path / "tiny")


@pytest.fixture
def text_file(tmp_path):
    """A file with the tiny text."""
    path = tmp_path / "text.txt"
    path.write_text(tiny.text())
    return path


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a script's main() in this process as the command line does.

    Returns the exit code, stdout, and stderr without progress, which comes and goes.
    """
    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        code = 0
        try:
            console.run(main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        lines = err.splitlines(keepends=True)
        return code, out, "".join(line for line in lines if " s each " not in line)
    return call
