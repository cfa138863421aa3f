"""What `python -m compare` measures of a compressed model, and that it measures nothing twice."""
import json
import time

import pytest
import tiny
import torch

import calibrate
from compare import harness, network, rows
from compare.network import Calibration, Measured, Network


def random_network(L=3):
    cfg = tiny.config(num_hidden_layers=L)
    blocks = [tiny.block(cfg, seed) for seed in range(L)]
    return Network(cfg, blocks, tiny.random_tensors(cfg.outer_shapes(), 99))


def random_windows(n=20, length=40, vocab=300):
    g = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (n, length), generator=g)


def slowly(monkeypatch, seconds):
    """Make a measurement take a while. Returns a list with the networks that were measured."""
    measure, calls = calibrate.measure, []

    def slow(net, tokens, runner):
        calls.append(net)
        time.sleep(seconds)
        return measure(net, tokens, runner)
    monkeypatch.setattr(calibrate, "measure", slow)
    return calls


def test_calibrations_of_the_same_windows_share_measurements_and_their_cost(monkeypatch):
    calls, dense, measured = slowly(monkeypatch, 0.05), random_network(4), Measured()
    tokens, runner = random_windows(4), tiny.runner(dense.config, 40)
    first, second = (Calibration(tokens, runner, 4, measured=measured) for _ in range(2))
    result = first.measure(dense)
    assert first.measure(dense) is result and (first.passes, first.saved) == (1, 0)
    assert second.measure(dense) is result and second.measure(dense) is result
    assert second.passes == 1 and 0.05 <= second.saved < 5 and len(calls) == 1
    shallow = dense.with_blocks(dense.blocks[:2])
    second.measure(shallow)
    assert second.passes == 1.5 and len(calls) == 2
    del shallow, second
    calls.clear()
    assert list(measured) == [dense]  # what nobody uses any more is forgotten


@pytest.fixture
def command(ckpt, text_file):
    return ["--ckpt", ckpt, "--data", text_file, "--samples", 4, "--length", 32, "--windows", 3,
            "--ratios", 0.15, "--seeds", 2]


def results(out):
    return [json.loads(line) for line in (out / rows.RESULTS).read_text().splitlines()]


def test_the_dense_model_is_read_once_and_measured_once_a_seed(command, tmp_path, cli,
                                                               monkeypatch):
    calls, read, of = slowly(monkeypatch, 0.2), [], Network.of
    monkeypatch.setattr(network.Network, "of", lambda source: read.append(source) or of(source))
    code, _, err = cli(harness.main, *command, "--out", tmp_path / "o",
                       "--methods", "shortgpt", "flattengpt", "last")
    assert (code, err, len(calls), len(read)) == (0, "", 2, 1)
    for row in results(tmp_path / "o"):
        asked = row["method"] in ("shortgpt", "flattengpt")
        assert (row["seconds"] >= 0.2) == asked
        assert row["passes"] == {"shortgpt": 1, "flattengpt": 2}.get(row["method"], 0)
