"""The leaderboard: what counts is a checkpoint that opens, is small, and was made in time."""
import argparse
import json
import re

import tiny
import torch

from checkpoint.reader import Checkpoint
from course import leaderboard
from text.tokenizer import load_tokenizer
from text.wikitext import calibration_text, held_out_text

EXAMPLE, RECOVERY = re.findall(r"```python\n(.*?)```", (
    tiny.ROOT / "course" / "LEADERBOARD.md").read_text(), re.DOTALL)
ENTRIES = {
    "example": EXAMPLE,
    "same": "def compress(network, n, text):\n    return network\n",
    "broken": "def compress(network, n, text):\n    raise ValueError('no idea')\n",
    "spy": """
import json, time
from pathlib import Path

def compress(network, n, text):
    Path(__file__).with_name("seen.json").write_text(json.dumps(text.tokens.tolist()))
    time.sleep(3)
    return network.with_blocks(network.blocks[n:])
"""}


def test_entries_are_checked_and_scored_and_see_calibration_text_only(ckpt, text_file, tmp_path,
                                                                      cli):
    folders = [tmp_path / name for name in ENTRIES]
    for folder, code in zip(folders, ENTRIES.values(), strict=True):
        folder.mkdir()
        (folder / "entry.py").write_text(code)
    code, out, _ = cli(leaderboard.main, *folders, "--ckpt", ckpt, "--data", text_file,
                       "--samples", 4, "--length", 32, "--seconds", 2)
    assert code == 0, out
    rows = {row.split(" | ")[0].strip("| "): row for row in out.splitlines()[2:]}
    dense = Checkpoint(ckpt)
    n = leaderboard.merges_for_ratio(dense.config, 0.2, 5)
    left = dense.config.parameters() - n * dense.config.block_parameters()
    perplexity, excess = re.search(rf"\| {left:,} \| {5 - n} \| ([\d.]+) \| (-?[\d.]+) \| 0\.\d \|",
                                   rows["example"]).groups()
    assert float(perplexity) > 1 and abs(float(excess)) < 5
    assert "parameters; at most" in rows["same"] and "failed: no idea" in rows["broken"]
    assert "at most 2 are allowed" in rows["spy"]

    tokenizer = load_tokenizer(ckpt)
    calibration, judged = (" ".join(map(str, tokenizer.encode(text))) for text in (
        calibration_text(str(text_file))[0], held_out_text([str(text_file)])[0]))
    seen = json.loads((folders[-1] / "seen.json").read_text())
    assert len(seen) == 4
    for window in seen:
        words = " ".join(map(str, window))
        assert words in calibration and words not in judged


def test_the_recovery_task_gives_more_text_and_its_example_learns(ckpt, text_file, tmp_path, cli):
    losses = []
    for name, peak in (("taught", "3e-3"), ("idle", "0.0")):
        (tmp_path / name).mkdir()
        code = RECOVERY.replace("PEAK = 3e-3", f"PEAK = {peak}")
        (tmp_path / name / "entry.py").write_text(code)
    code, out, _ = cli(leaderboard.main, "--task", "recover", tmp_path / "taught",
                       tmp_path / "idle", "--ckpt", ckpt, "--data", text_file, "--length", 16)
    assert code == 0 and "320 x 16 tokens for the function" in out, out
    for name in ("taught", "idle"):
        losses.append(float(re.search(rf"\| {name} .* \| (-?[\d.]+) \| [\d.]+ \|", out)[1]))
    assert losses[0] < losses[1]


def test_an_entry_that_does_not_end_is_stopped(ckpt, text_file):
    args = argparse.Namespace(ckpt=ckpt, data=[str(text_file)], samples=4, length=32,
                              seconds=0.5 - leaderboard.STARTING)
    row = leaderboard.score("last", Checkpoint(ckpt), 1.0, torch.ones(1, 32).long(), args)
    assert "failed: stopped after" in row
