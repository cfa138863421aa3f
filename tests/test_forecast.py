"""What --dry-run says: computed by hand for LLaMA-2-7B, and for what a run then makes."""
import pytest
import tiny
import torch

import flatten
from beyond import refit
from calibrate import SAMPLE
from checkpoint.reader import Checkpoint
from console import forecast

LLAMA2_7B = tiny.config(model_type="llama", hidden_size=4096, intermediate_size=11008,
                        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                        vocab_size=32000, head_dim=128)
PAPER = LLAMA2_7B, 128, 2048, 2  # windows of tokens, in bfloat16


def test_the_memory_of_the_first_pass_written_out():
    assert forecast.measuring(*PAPER, sample=2048) == {
        "streams": 2_147_483_648,                                     # 128 * 2048 * 4096 * 2
        "sample": 553_648_128,                                        # 33 * 2048 * 4096 * 2
        "libraries": 5_000_000,
        "batch": 292_552_704}                    # 2048 * ((3 * 11008 + 4 * 4096) * 2 + 4 * 11008)
    few = forecast.measuring(LLAMA2_7B, 2, 100, 2, sample=2048)
    assert few["sample"] == 54_067_200                                # 33 * 200 * 4096 * 2


def test_the_memory_of_pruning_written_out():
    assert forecast.pruning(*PAPER, width=2) == {
        "streams": 2_147_483_648, "libraries": 5_000_000,
        "wide block": 809_533_440,                                    # 2 * 202,383,360 * 2
        "statistics": 1_938_817_024,                                  # 22016^2 * 4
        "solve": 4_012_900_352}                                       # 22016 * (22016 + 768) * 8
    assert forecast.pruning(*PAPER, width=4)["solve"] == 15_781_068_800
    small = forecast.pruning(tiny.config(), 100, 64, 4, width=2)
    assert small["solve"] == 3_014_656                                # 2048 * (3 * 80 + 4 * 32) * 4


def test_the_memory_of_an_evaluation_written_out():
    assert forecast.evaluating(*PAPER) == {
        "streams": 2_147_483_648, "libraries": 5_000_000,
        "block": 404_766_720,
        "head": 655_360_000,                                          # 32000 * (4096 * 2 + 12288)
        "batch": 292_552_704}


def test_the_memory_of_the_fit_written_out():
    assert refit.fitting(*PAPER, width=2) == {
        "streams": 8_589_934_592, "libraries": 5_000_000,             # two, and one in float32
        "wide block": 1_619_066_880,                                  # twice
        "a few windows": 3_221_225_472,                               # 2 * 3 * 32 * 2048 * 4096 * 2
        "solve": 6_526_599_168}                                       # 16 * 16512 * (16512 + 8192)
    assert refit.fitting(LLAMA2_7B, 128, 8192, 2, 2)["solve"] == 17_179_869_184  # 2 * 32 * 2^26 * 4
    assert refit.fitting(LLAMA2_7B, 128, 2048, 2, 5)["solve"] == 9_395_240_960   # heads: 20480


@pytest.mark.parametrize("script, options, passes", [
    (flatten, [], 2), (refit, [], 4), (refit, ["--group-by", "similarity"], 2)])
def test_a_dry_run_tells_what_the_run_makes_and_reads_and_writes_nothing(
        ckpt, text_file, tmp_path, cli, monkeypatch, script, options, passes):
    arguments = ["--ckpt", ckpt, "--data", text_file, "--ratio", 0.25, "--samples", 8, "--length",
                 32, "--out", tmp_path / "out", *options]
    with monkeypatch.context() as patched:
        for module, name in ((script, "read_tokens"), (flatten, "held_out_text"),
                             (Checkpoint, "_read")):
            patched.setattr(module, name, lambda *args: pytest.fail("read"))
        code, told, _ = cli(script.main, *arguments, "--dry-run")
    assert code == 0 and not (tmp_path / "out").exists()
    code, printed, _ = cli(script.main, *arguments, "--no-eval")
    blocks, sizes = printed[printed.index("wrote"):].split(": ", 1)[1].split(" blocks, ")
    assert code == 0 and f"-> {blocks} blocks, {sizes.strip()}" in told
    assert f"one pass of 8 x 32 tokens and {passes - 1} of at most 8 x 32, each" in told
    streams = sum(forecast.measuring(Checkpoint(ckpt).config, 8, 32, 4, SAMPLE).values())
    assert f"{streams / 1e6:,.0f} MB" in told and told.count("memory, ") == 3


def test_several_processes_share_the_streams(ckpt, cli, monkeypatch):
    monkeypatch.setattr(flatten.parallel, "ranks", lambda: 3)
    config = Checkpoint(ckpt).config
    told = cli(flatten.main, "--ckpt", ckpt, "--samples", 9000, "--length", 16, "--max-group", 2,
               "--dry-run")[1]
    assert "one pass of 1024 x 16 tokens and 1 of at most 9000 x 16" in told
    for part in (forecast.row("first pass", forecast.measuring(config, 342, 16, 4, SAMPLE)),
                 forecast.row("2 blocks", forecast.pruning(config, 3000, 16, 4, 2))):
        assert part in told


def test_a_dry_run_without_its_text_is_refused(ckpt, cli):
    code, _, err = cli(flatten.main, "--ckpt", ckpt, "--data", "nothing.txt", "--dry-run")
    assert code == 2 and "nothing.txt: no such file" in err and err.count("\n") == 1


def test_a_dry_run_that_only_flattens_removes_no_parameter(ckpt, cli):
    code, told, _ = cli(flatten.main, "--ckpt", ckpt, "--keep-wide", "--dry-run")
    before, after = told.split(" blocks, ")[1].split(" parameters")[0].split(" -> ")
    assert code == 0 and before == after and "solve" not in told


def test_the_largest_group_is_what_the_memory_holds(monkeypatch):
    def memory(width: int) -> dict[str, int]:
        return {"streams": 50, "solve": 10 * width ** 2}
    for free, blocks in ((1e9, 7), (1.2 * 300, 5), (1.2 * 299, 4), (0, 2)):
        monkeypatch.setattr(forecast, "free_memory", lambda device, free=free: free)
        assert forecast.largest_group(memory, 7, "cpu") == blocks
    monkeypatch.setattr(forecast, "free_memory", lambda device: 1.2 * 249)
    assert forecast.largest_group(memory, 7, "cuda") == 4  # streams stay on the host


@pytest.mark.parametrize("files, free", [
    ({}, float("inf")),
    ({"memory.max": "max", "memory.stat": "anon 300\nfile 500"}, float("inf")),
    ({"memory.max": "1000", "memory.high": "max", "memory.stat": "anon 300\nfile 500"}, 700),
    ({"memory.max": "1000", "memory.high": "800", "memory.stat": "anon 300\nfile 500"}, 500),
    ({"memory.max": "1000", "memory.stat": "anon 1300"}, 0),
    ({"memory/memory.limit_in_bytes": "1000", "memory/memory.stat": "rss 1\ntotal_rss 400"}, 600),
    ({"own": "0::/a/b", "a/memory.max": "1000", "a/memory.stat": "anon 300",
      "a/b/memory.max": "900", "a/b/memory.stat": "anon 100"}, 700),
    ({"own": "9:cpu:/a\n4:memory:/b/c", "a/memory.max": "9", "a/memory.stat": "anon 0",
      "memory/b/c/memory.limit_in_bytes": "1000", "memory/b/c/memory.stat": "total_rss 400"}, 600),
    ({"own": "0::/../a", "a/memory.max": "1000", "a/memory.stat": "anon 300"}, float("inf"))])
def test_the_limit_of_a_container_is_respected(tmp_path, monkeypatch, files, free):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert forecast.group_memory(tmp_path, tmp_path / "own") == free
    monkeypatch.setattr(forecast, "group_memory", lambda: 640)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert forecast.free_memory("cpu") == 320


def test_a_gpu_reads_as_many_tokens_at_a_time_as_memory_allows(monkeypatch):
    batch = forecast.batch(LLAMA2_7B, 1, 1, 2, width=2)               # of one token: 253,952 bytes
    assert batch == (3 * 22016 + 4 * 4096) * 2 + 4 * 22016
    for free, tokens in ((0, 2048), (16 * 5000.5 * batch, 5000), (1e15, 16384)):
        monkeypatch.setattr(forecast, "free_memory", lambda device, free=free: free)
        assert forecast.batch_tokens(LLAMA2_7B, torch.device("meta"), 2) == tokens
        assert forecast.batch_tokens(LLAMA2_7B, torch.device("cpu"), 2) == 2048


@pytest.mark.parametrize("main", [flatten.main, refit.main])
def test_a_group_that_memory_does_not_hold_is_not_planned(ckpt, cli, monkeypatch, main):
    arguments = "--ckpt", ckpt, "--ratio", 0.2, "--dry-run"
    told = cli(main, *arguments)[1]
    assert "--max-group" not in told
    assert ("4 pairs of neighbours and" in told) == (main is refit.main)
    monkeypatch.setattr(forecast, "free_memory", lambda device: 0)
    code, told, _ = cli(main, *arguments)
    assert code == 0 and "too little for groups of 3 blocks: --max-group 2" in told
    assert told.count(" blocks  ") == 1 and "triples" not in told
    code, _, error = cli(main, "--ckpt", ckpt, "--ratio", 0.5, "--dry-run")
    most = "2 allow 2 merges" if main is flatten.main else "3 allow 3 merges"
    assert code == 2 and f"groups of at most {most}" in error and "larger groups" in error
