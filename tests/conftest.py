import os
import sys

import pytest
import tiny
import torch

import console

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # pytest -n auto has a process for each core
torch.set_num_threads(min(int(os.environ.get("OMP_NUM_THREADS", 2)), console.cores()))

LONGEST = ("test_walkthrough.py", "test_demo.py")


def pytest_collection_modifyitems(items):
    """Begin with the longest tests: at the end one process would run them and the others wait."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


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


@pytest.fixture
def psi():
    """Correlated channels of unequal size, (tokens, F)."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(tiny.F, tiny.F, generator=g, dtype=torch.float64) / tiny.F ** 0.5
    mix = mix + 0.5 * tiny.eye(tiny.F)
    sizes = torch.linspace(0.2, 3, tiny.F, dtype=torch.float64)[torch.randperm(tiny.F, generator=g)]
    return torch.randn(400, tiny.F, generator=g, dtype=torch.float64) @ mix * sizes


@pytest.fixture
def C(psi):
    return psi.T @ psi / len(psi)


@pytest.fixture
def W():
    g = torch.Generator().manual_seed(1)
    return torch.randn(tiny.d, tiny.F, generator=g, dtype=torch.float64)
