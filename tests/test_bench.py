"""The speed and cost scripts run and print what they say."""
import json

import pytest
import tiny

import calibrate
from compare import refit_cost, speed


def test_speed_prints_both_models_and_the_bound(tmp_path, cli):
    dense = tiny.checkpoint(tmp_path / "dense", num_hidden_layers=6)
    flat = tiny.checkpoint(tmp_path / "flat", num_hidden_layers=3)
    file = tmp_path / "rows" / "speed.jsonl"
    code, out, err = cli(speed.main, "--ckpt", dense, flat, "--batch", 1, 2, "--prefill", 16,
                         "--prompt", 4, "--new", 3, "--repeats", 1, "--out", file)
    assert (code, err) == (0, "") and "6 and 3 blocks" in out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["what"], row["batch"]) for row in rows] == [
        ("prefill", 1), ("decode", 1), ("prefill", 2), ("decode", 2)]
    block, head = tiny.config().block_parameters(), 300 * 32
    assert rows[0]["bound"] == pytest.approx((6 * 16 * block + head) / (3 * 16 * block + head))
    assert rows[1]["bound"] == pytest.approx((6 * block + head) / (3 * block + head))
    assert all(row["ratio"] == pytest.approx(row["flattened"] / row["dense"]) for row in rows)


@pytest.mark.parametrize("options, message", [
    ([], "either --shape or --ckpt"), (["--shape", "llama-2-70b"], "are free"),
    (["--shape", "tinyllama", "--repeats", 0], "at least 1")])
def test_speed_refuses_in_one_line(options, message, cli, monkeypatch):
    monkeypatch.setattr(speed, "free_memory", lambda device: 10e9)
    code, _, err = cli(speed.main, *options)
    assert code == 2 and message in err and err.count("\n") == 1


def test_the_fit_of_a_pair_is_timed_next_to_the_papers_pruning(monkeypatch, cli):
    monkeypatch.setitem(speed.SHAPES, "tinyllama", (32, 48, 6, 4, 2, 100))
    seen, observe = [], refit_cost.observe
    monkeypatch.setattr(calibrate, "MEASURED", 40)
    monkeypatch.setattr(refit_cost, "observe",
                        lambda block, x, rope: seen.append(len(x)) or observe(block, x, rope))
    code, out, err = cli(refit_cost.main, "--samples", 5, "--length", 16)
    assert (code, err) == (0, "") and seen == [2]  # as a run measures
    assert "6 blocks, 2 pairs" in out and out.count("refit / paper: ") == 2


def test_with_only_one_way_nothing_else_is_timed(monkeypatch, cli):
    monkeypatch.setitem(speed.SHAPES, "tinyllama", (32, 48, 6, 4, 2, 100))
    code, out, err = cli(refit_cost.main, "--samples", 2, "--length", 16, "--only", "refit")
    assert (code, err) == (0, "") and out.count("\n") == 1 and "fit a pair" in out
