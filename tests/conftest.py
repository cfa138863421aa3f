import os
import sys

import pytest
import tiny
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(2)


@pytest.fixture
def ckpt(tmp_path):
    """A tiny random checkpoint."""
    return tiny.checkpoint(tmp_path / "tiny")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny.text())
    return path


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a script's main() in this process as the command line does: (exit code, stdout, stderr)."""
    from console import run

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        code = 0
        try:
            run(main)
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        errors = [line for line in out.err.splitlines(keepends=True) if " s each " not in line]  # progress comes and goes
        return code, out.out, "".join(errors)
    return call
