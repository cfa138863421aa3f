"""What someone who runs the scripts may rely on.

The result is a plain checkpoint, the same command writes the same bytes, and failure is clean.
"""
import argparse
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import calibrate
import console.options
import evaluate
import flatten
import model
from beyond import refit
from checkpoint.reader import Checkpoint
from compare import harness
from model import generate, load
from text import wikitext

ROOT = Path(__file__).parents[1]
SHORT = ["--samples", 8, "--length", 32, "--no-eval"]
FAMILIES = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
              "num_attention_heads": 4},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
                "sliding_window": 400},
    "qwen2": {"layer_types": ["full_attention"] * 5, "max_window_layers": 5,
              "use_sliding_window": False},
    "qwen2_tied": {"tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12}}


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir())}


def record_of(folder):
    return json.loads((folder / "flatten.json").read_text())


def groups_in(folder):
    return [group["blocks"] for group in record_of(folder)["groups"]]


@pytest.fixture
def run(cli, text_file):
    """Run a script on the text file, and expect it to succeed (or to fail with expect=2).

    Returns what it printed: stdout, or stderr if it was to fail.
    """
    def call(main, *arguments, expect=0):
        code, out, err = cli(main, *arguments, "--data", text_file)
        assert code == expect, err
        return out if expect == 0 else err
    return call


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_a_plain_checkpoint_that_transformers_runs_alike(tmp_path, run, family,
                                                                       dtype):
    transformers = pytest.importorskip("transformers")
    path, out = tiny.checkpoint(tmp_path / "m", dtype=dtype, **FAMILIES[family]), tmp_path / "out"
    run(flatten.main, "--ckpt", path, "--ratio", 0.3, "--out", out, *SHORT)
    ids = torch.randint(3, 300, (2, 50), generator=torch.Generator().manual_seed(0))
    net, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = load(out, dtype=torch.float32)
    with torch.no_grad():
        expected = net(ids).logits
        assert (ours(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
    expected = net.generate(ids[:1], max_new_tokens=16, do_sample=False, eos_token_id=None,
                            pad_token_id=0)
    assert torch.equal(generate(ours, ids[:1], 16), expected)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (path, out))
    assert old.keys() == new.keys()
    changed = {key for key in old if old[key] != new[key]}
    assert changed <= {"num_hidden_layers", "layer_types", "max_window_layers"}


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_only_merged_blocks_change(tmp_path, ckpt, run, ratio):
    out = tmp_path / "out"
    run(flatten.main, "--ckpt", ckpt, "--ratio", ratio, "--out", out, *SHORT)
    before, after = load_file(ckpt / "model.safetensors"), load_file(out / "model.safetensors")
    groups = groups_in(out)
    assert [i for group in groups for i in group] == list(range(5))
    for new, group in enumerate(groups):
        for name in Checkpoint(out).config.block_shapes():
            same = torch.equal(after[f"model.layers.{new}.{name}"],
                               before[f"model.layers.{group[0]}.{name}"])
            assert same == (len(group) == 1), (new, name)
    assert all(torch.equal(after[name], before[name]) for name in after if "layers" not in name)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5])
def test_the_ratio_is_counted_on_the_files_and_every_merge_has_a_row(tmp_path, ckpt, run, ratio):
    out = tmp_path / "out"
    printed = run(flatten.main, "--ckpt", ckpt, "--ratio", ratio, "--out", out, *SHORT)
    before, after = (sum(t.numel() for t in load_file(folder / "model.safetensors").values())
                     for folder in (ckpt, out))
    reached = 1 - after / before
    assert record_of(out)["ratio_reached"] == pytest.approx(reached, abs=1e-6)
    assert f"ratio {reached:.4f} (asked {ratio})" in printed
    config = Checkpoint(ckpt).config
    assert reached - config.block_parameters() / config.parameters() < ratio <= reached
    rows = [line for line in printed.splitlines() if line.startswith("blocks ")]
    assert len(rows) == sum(len(group) > 1 for group in groups_in(out))
    words = "similarity", "heads", "channels", "flattened", "selected", "compensated"
    assert all(word in row for row in rows for word in words)


def test_the_same_command_writes_the_same_bytes_and_another_seed_does_not(tmp_path, ckpt, run):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(flatten.main, "--ckpt", ckpt, "--ratio", 0.3, "--out", tmp_path / name,
            "--seed", seed, *SHORT)
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert a == b and a["model.safetensors"] != c["model.safetensors"]


def test_the_record_says_how_to_repeat_the_run(tmp_path, ckpt, run, cli):
    out = tmp_path / "out"
    run(flatten.main, "--ckpt", ckpt, "--ratio", 0.3, "--out", out, *SHORT)
    record = record_of(out)
    for key in ("settings", "calibration", "versions", "groups", "ratio_asked", "ratio_reached"):
        assert key in record
    words = record["command"].split()
    assert words[:2] == ["python", "flatten.py"]
    code, _, err = cli(flatten.main, *words[2:], "--out", tmp_path / "again", "--no-eval")
    assert code == 0, err
    assert hashes(out)["model.safetensors"] == hashes(tmp_path / "again")["model.safetensors"]


@pytest.fixture
def two_texts(tmp_path, text_file):
    """The text file, and one of the same words in another order, with a space in its name."""
    other = tmp_path / "other words.txt"
    other.write_text("\n".join(reversed(tiny.text().split("\n"))))
    return [text_file, other]


@pytest.mark.parametrize("main, options", [
    (flatten.main, []), (flatten.main, ["--keep-wide"]), (refit.main, [])])
def test_several_texts_share_the_windows_and_the_record_says_how_to_repeat_it(
        tmp_path, ckpt, cli, two_texts, main, options):
    first, out = two_texts[0], tmp_path / "out"
    run = ["--ckpt", ckpt, "--ratio", 0.3, *SHORT, *options]
    code, printed, err = cli(main, *run, "--data", *two_texts, "--out", out)
    assert code == 0, err
    record = record_of(out)
    assert record["settings"]["data"] == [str(text) for text in two_texts]
    names = "text.txt, first 90% + other words.txt, first 90%"
    assert record["calibration"]["text"] == names and names in printed
    words = shlex.split(record["command"])
    start = words.index("--ckpt")
    assert cli(main, *words[start:], "--out", tmp_path / "again", "--no-eval")[0] == 0
    assert hashes(out)["model.safetensors"] == hashes(tmp_path / "again")["model.safetensors"]
    assert cli(main, *run, "--data", first, "--out", tmp_path / "one")[0] == 0
    one = record_of(tmp_path / "one")
    assert one["settings"]["data"] == str(first)
    assert one["calibration"]["sha256_of_ids"] != record["calibration"]["sha256_of_ids"]


@pytest.mark.parametrize("several", [False, True])
def test_step_4_takes_one_text_or_several_from_the_record(tmp_path, ckpt, cli, two_texts, several):
    """One is recorded as a string, as it was when --data took no more than one."""
    data = two_texts if several else two_texts[:1]
    run = ["--ckpt", ckpt, "--ratio", 0.3, "--data", *data, *SHORT]
    for name, options in (("one", []), ("wide", ["--keep-wide"])):
        assert cli(flatten.main, *run, "--out", tmp_path / name, *options)[0] == 0
    recorded = record_of(tmp_path / "wide")["settings"]["data"]
    assert recorded == (list(map(str, data)) if several else str(data[0]))
    code, _, err = cli(flatten.main, "--ckpt", tmp_path / "wide", "--out", tmp_path / "two")
    assert code == 0, err
    one, two = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    assert hashes(tmp_path / "one")["model.safetensors"] == \
        hashes(tmp_path / "two")["model.safetensors"]
    assert one["calibration"] == two["calibration"]
    assert one["settings"] == two["settings"] | {"max_group": None}


def test_the_first_of_several_texts_judges(tmp_path, ckpt, cli, two_texts):
    code, out, err = cli(flatten.main, "--ckpt", ckpt, "--ratio", 0.3, "--out", tmp_path / "flat",
                         "--data", *two_texts[::-1], *SHORT[:-1])
    assert code == 0, err
    assert "other words.txt, last 10%" in out and "text.txt, last 10%" not in out


def unchanged(path):
    pass


def missing(path):
    path.unlink()


@pytest.mark.parametrize("spoil, message", [
    (unchanged, "WikiText-2's test split"), (missing, "no such file"),
    (lambda path: path.write_text("short\n"), "text 2 of --data has")])
def test_a_mistake_in_the_second_text_is_one_line_that_names_it(
        tmp_path, ckpt, cli, two_texts, monkeypatch, spoil, message):
    first, second = two_texts
    sha256 = hashlib.sha256(second.read_bytes()).hexdigest()
    monkeypatch.setattr(wikitext, "TEST_SHA256", sha256)
    spoil(second)
    out = tmp_path / "results" / "out"
    code, _, err = cli(flatten.main, "--ckpt", ckpt, "--data", first, second, "--out", out, *SHORT)
    assert code == 2 and message in err and err.count("\n") == 1 and not out.parent.exists()
    assert str(second) in err or "text 2" in err


@pytest.mark.parametrize("family, dtype, compute", [
    ("qwen2", torch.float32, "float32"), ("qwen3", torch.bfloat16, "float32"),
    ("qwen2", torch.bfloat16, "bfloat16")])
def test_flattening_and_pruning_apart_equal_the_one_step_run(tmp_path, run, family, dtype, compute):
    path = tiny.checkpoint(tmp_path / "m", dtype=dtype, **FAMILIES[family])
    settings = ["--ckpt", path, "--ratio", 0.35, "--ridge", 3, "--seed", 5, "--dtype", compute,
                "--max-group", 4, *SHORT]
    run(flatten.main, *settings, "--out", tmp_path / "one")
    run(flatten.main, *settings, "--out", tmp_path / "wide", "--keep-wide")
    run(flatten.main, "--ckpt", tmp_path / "wide", "--out", tmp_path / "two")
    one, two = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    assert one.keys() == two.keys()
    changed = {name for name in one if one[name] != two[name]}
    assert changed == {"flatten.json", "README.md"}  # which name the command
    one, two = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    assert one["settings"] == two["settings"] | {"max_group": 4}
    assert one["parameters_after"] == two["parameters_after"]
    assert two["command"].startswith("python flatten.py")
    assert "--keep-wide" in two["flatten_command"] and two["errors_relative_to"] == "wide block"
    for a, b in zip(one["groups"], two["groups"], strict=True):
        assert a["blocks"] == b["blocks"] and a.get("channels") == b.get("channels")
    words = record_of(tmp_path / "two")["command"].split()
    run(flatten.main, *words[2:], "--out", tmp_path / "again")
    again = hashes(tmp_path / "again")["model.safetensors"]
    assert again == hashes(tmp_path / "two")["model.safetensors"]


def test_a_wide_checkpoint_says_that_only_our_loader_reads_it(tmp_path, ckpt, run):
    wide = tmp_path / "wide"
    run(flatten.main, "--ckpt", ckpt, "--ratio", 0.35, "--out", wide, "--keep-wide", *SHORT)
    assert max(Checkpoint(wide).config.widths) > 1
    card = (wide / "README.md").read_text()
    assert "python flatten.py --ckpt" in card and "transformers" not in card
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="flattened_wide"):
        transformers.AutoConfig.from_pretrained(wide)


def test_a_wide_checkpoint_runs_as_its_members_side_by_side(tmp_path, ckpt, run):
    path = tmp_path / "wide"
    run(flatten.main, "--ckpt", ckpt, "--ratio", 0.1, "--out", path, "--keep-wide", *SHORT)
    wide, dense, ids = load(path), load(ckpt), torch.arange(3, 30)[None]
    blocks, rope = dense.model["layers"], model.rope_table(dense.config, 0, 27, like=torch.empty(0))
    with torch.no_grad():
        x = dense.model["embed_tokens"](ids)
        for group in groups_in(path):
            x = x + sum(blocks[i].attend(x, rope) for i in group)
            x = x + sum(blocks[i].feed(x) for i in group)
        expected = dense.head(dense.model["norm"](x))
        torch.testing.assert_close(wide(ids), expected, atol=1e-4, rtol=1e-4)


def test_perplexity_is_compared_at_the_end_and_explain_says_more(tmp_path, ckpt, run):
    out = run(flatten.main, "--ckpt", ckpt, "--ratio", 0.3, "--out", tmp_path / "flat", "--explain",
              *SHORT[:-1])
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| checkpoint", "| tiny", "| flat"]
    assert "effective dimensions" in out and "text.txt, last 10%" in out


@pytest.mark.parametrize("script", [flatten, refit, evaluate])
@pytest.mark.parametrize("context, told", [(31, True), (32, False), (None, False)])
def test_windows_longer_than_the_models_context_are_told(tmp_path, run, script, context, told):
    folder = tiny.checkpoint(tmp_path / "tiny", max_position_embeddings=context)
    out = run(script.main, "--ckpt", folder, *(["--window", 32] if script is evaluate else
                                              [*SHORT, "--out", tmp_path / "out"]))
    remark = "tiny was made for texts of at most 31 tokens; these windows have 32"
    assert (remark in out) == told


def test_a_model_in_a_hub_cache_gives_its_name_to_outputs_and_rows(tmp_path, ckpt, run,
                                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tiny.hub_cache(ckpt, tmp_path / "hub")
    out = run(flatten.main, "--ckpt", path, "--ratio", 0.3, *SHORT[:-1])
    rows = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| ")]
    assert rows == ["| checkpoint", "| Tiny-1B", "| Tiny-1B-flat-0.3"]
    assert os.listdir("out") == ["Tiny-1B-flat-0.3"]


def test_calibrate_prints_the_motivation_and_saves_S(tmp_path, ckpt, run):
    out = run(calibrate.main, "--ckpt", ckpt, "--out", tmp_path / "S.npy", *SHORT[:-1])
    assert all(word in out for word in ("variance", "|attention|", "|MLP|", "similarity"))
    S = np.load(tmp_path / "S.npy", allow_pickle=False)
    assert S.shape == (5, 5) and np.allclose(S.diagonal(), 1, atol=1e-5) and np.allclose(S, S.T)


def test_calibrate_says_which_texts_it_used(tmp_path, ckpt, cli, two_texts):
    code, out, err = cli(calibrate.main, "--ckpt", ckpt, "--data", *two_texts,
                         "--out", tmp_path / "S.npy", *SHORT[:-1])
    assert code == 0, err
    assert "on 8 of 8 windows of 32 tokens of text.txt, first 90% + other words.txt, first 90%, " \
        "seed 0" in out


def test_a_matrix_appears_whole_or_not_at_all_and_for_all_who_may_read_its_folder(
        tmp_path, ckpt, run, monkeypatch):
    out, command = tmp_path / "new" / "S.npy", (calibrate.main, "--ckpt", ckpt, *SHORT[:-1])
    run(*command, "--out", out)
    (tmp_path / "other").write_text("")
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode

    def full(file, array):
        file.write(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(calibrate.np, "save", full)
    assert "no space" in run(*command, "--out", out, "--overwrite", expect=2)
    assert np.load(out).shape == (5, 5) and list(out.parent.iterdir()) == [out]


def test_calibrate_replaces_a_matrix_only_when_asked_and_nothing_else_at_all(tmp_path, ckpt, run):
    (tmp_path / "S.npy").write_bytes(b"earlier")
    for out, options in ((tmp_path / "S.npy", []), (ckpt / "config.json", ["--overwrite"]),
                         (ckpt / "model.safetensors", ["--overwrite"])):
        before = out.read_bytes()
        error = run(calibrate.main, "--ckpt", ckpt, "--out", out, *options, *SHORT[:-1], expect=2)
        assert "exists" in error and out.read_bytes() == before


def test_max_group_limits_the_groups(tmp_path, ckpt, run):
    out = tmp_path / "out"
    run(flatten.main, "--ckpt", ckpt, "--ratio", 0.2, "--max-group", 2, "--out", out, *SHORT)
    assert max(map(len, groups_in(out))) == 2


def test_reported_errors_are_those_of_the_blocks(tmp_path, ckpt, run):
    """They are recomputed from the checkpoints on disk, for the first merged group.

    Its input is the dense model's, so no compressed block is needed to get there.
    """
    out, wide = tmp_path / "out", tmp_path / "wide"
    settings = ["--ckpt", ckpt, "--ratio", 0.1, "--samples", 1, "--length", 64, "--no-eval"]
    run(flatten.main, *settings, "--out", out)
    run(flatten.main, *settings, "--out", wide, "--keep-wide")
    groups = record_of(out)["groups"]
    k = next(k for k, group in enumerate(groups) if len(group["blocks"]) > 1)
    args = argparse.Namespace(data=[str(tmp_path / "text.txt")], samples=1, length=64, seed=0)
    tokens, _ = calibrate.read_tokens(ckpt, args)
    dense, blocks = load(ckpt), {name: load(path).model["layers"][k]
                                 for name, path in (("flattened", wide), ("compensated", out))}
    rope = model.rope_table(dense.config, 0, 64, like=torch.empty(0))
    with torch.no_grad():
        x = dense.model["embed_tokens"](tokens)
        for i in range(k):
            x = dense.model["layers"][i](x, rope)
        y = x
        for i in groups[k]["blocks"]:
            y = dense.model["layers"][i](y, rope)
        for name, block in blocks.items():
            error = (block(x, rope) - y).norm(dim=-1) / (y - x).norm(dim=-1)
            assert groups[k][f"error_{name}"] == pytest.approx(float(error.mean()), rel=1e-4)
    assert groups[k]["error_selected"] != groups[k]["error_compensated"]


def test_two_passes_over_the_text_and_one_block_in_memory(tmp_path, run, monkeypatch):
    """Two passes of all windows at most; only those that errors are reported on pass more often."""
    path = tiny.checkpoint(tmp_path / "m", num_hidden_layers=8)
    tokens, blocks, alive = [], [], []
    plain, make = model.Block.attend, model.Runner.block

    def block(self, weights):
        blocks.append(weakref.ref(made := make(self, weights)))
        return made

    def attend(self, x, *args):
        tokens.append(x.shape[0] * x.shape[1])
        alive.append(sum(ref() is not None for ref in blocks))
        return plain(self, x, *args)
    monkeypatch.setattr(model.Block, "attend", attend)
    monkeypatch.setattr(model.Runner, "block", block)
    run(flatten.main, "--ckpt", path, "--ratio", 0.1, "--out", tmp_path / "out", "--samples", 32,
        "--length", 16, "--no-eval")
    text, probes, merges = 32 * 16, 2 * 16, 1
    assert sum(tokens) <= 2 * 8 * text + merges * 6 * probes
    assert max(alive) <= 2  # the one that runs, and the one before it until its name is taken


@pytest.mark.parametrize("script, options, passes", [
    (flatten, [], 2), (flatten, ["--keep-wide"], 2), (refit, [], 4),
    (refit, ["--group-by", "similarity"], 2)])
def test_every_block_is_read_once_in_each_pass(tmp_path, run, monkeypatch, script, options, passes):
    """S takes a pass, and so does merging; trial merges take one for each size of group."""
    path, reads, read = tiny.checkpoint(tmp_path / "m"), [], Checkpoint.block
    monkeypatch.setattr(Checkpoint, "block", lambda self, i: reads.append(i) or read(self, i))
    monkeypatch.setattr(model, "BATCH_TOKENS", 16)
    run(script.main, "--ckpt", path, "--ratio", 0.25, "--out", tmp_path / "out", "--samples", 8,
        "--length", 16, "--no-eval", *options)
    assert [reads.count(i) for i in range(5)] == [passes] * 5


@pytest.mark.parametrize("script, options, works", [
    (evaluate, ["--window", 16, "--max-windows", 2], True), (calibrate, SHORT[:4], True),
    (flatten, SHORT, False), (refit, SHORT, False)])
def test_only_what_solves_equations_needs_float64_of_the_device(ckpt, tmp_path, text_file, cli,
                                                                 monkeypatch, script, options,
                                                                 works):
    """A device without float64, such as mps, can evaluate; the rest is refused in one line."""
    def ones(*size, dtype=None, **options):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a tensor to float64")
        return torch.full(size, 1, dtype=dtype, **options)
    monkeypatch.setattr(torch, "ones", ones)
    out = [] if script is evaluate else ["--out", tmp_path / "out"]
    code, _, err = cli(script.main, "--ckpt", ckpt, "--data", text_file, *options, *out)
    assert (code == 0) if works else (code == 2 and "float64" in err and err.count("\n") == 1)


def test_streamed_evaluation_reads_every_block_once(ckpt, text_file, cli, monkeypatch):
    reads, read = [], Checkpoint.block
    monkeypatch.setattr(Checkpoint, "block", lambda self, i: reads.append(i) or read(self, i))
    monkeypatch.setattr(model, "BATCH_TOKENS", 16)
    cli(evaluate.main, "--ckpt", ckpt, "--data", text_file, "--window", 16, "--stream")
    assert reads == list(range(5))


@pytest.mark.parametrize("script, options", [
    (flatten, []), (refit, ["--group-by", "similarity"]), (flatten, ["--keep-wide"])])
def test_streams_end_with_the_last_joined_blocks(tmp_path, run, monkeypatch, script, options):
    """Blocks after them are copied: nothing would read what they make of the text."""
    path, out = tiny.checkpoint(tmp_path / "m", num_hidden_layers=5), tmp_path / "out"
    monkeypatch.setattr(script, "select_groups",
                        lambda S, merges, max_group: [[0], [1, 2], [3], [4]])
    attended, attend = [], model.Runner.attend

    def counted(*args):
        attended.append(args)
        attend(*args)
    monkeypatch.setattr(model.Runner, "attend", counted)
    run(script.main, "--ckpt", path, "--ratio", 0.1, "--out", out, *SHORT, *options)
    assert len(attended) == 2  # block 0 and the merged one
    old, new = Checkpoint(path).block(4), Checkpoint(out).block(3)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert len(Checkpoint(out).config.widths) == 4


def test_a_text_too_short_to_judge_on_is_noticed_before_the_work(tmp_path, ckpt, cli, text_file,
                                                                 monkeypatch):
    monkeypatch.setattr(flatten, "measure", lambda *args: pytest.fail("worked"))
    code, _, err = cli(flatten.main, "--ckpt", ckpt, "--data", text_file, "--out", tmp_path / "out",
                       "--samples", 1, "--length", 4000)
    assert code == 2 and "fewer than one window" in err


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def poison(path):
    def change(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    tiny.change_tensors(path, change)


def lose_tokenizer(path):
    (path / "tokenizer.model").unlink()


@pytest.mark.parametrize("spoil, arguments, message", [
    (unchanged, ["--ratio", 0], "between 0 and 1"),
    (unchanged, ["--ratio", 1.5], "between 0 and 1"),
    (unchanged, ["--ratio", 0.99], "out of reach"), (unchanged, ["--max-group", 1], "--max-group"),
    (unchanged, ["--samples", 0], "--samples"), (unchanged, ["--samples", 99999], "99999"),
    (unchanged, ["--length", 1], "--length"), (unchanged, ["--device", "warp"], "warp"),
    (unchanged, ["--ridge", 0], "--ridge"), (unchanged, ["--ridge", "nan"], "--ridge"),
    (truncate, [], "truncated or corrupt"), (poison, [], "block 2"),
    (lose_tokenizer, [], "no tokenizer")])
def test_mistakes_end_in_one_line_and_write_nothing(tmp_path, ckpt, cli, text_file, spoil,
                                                    arguments, message):
    spoil(ckpt)
    out = tmp_path / "results" / "out"
    code, printed, err = cli(flatten.main, "--ckpt", ckpt, "--data", text_file, "--out", out,
                             *SHORT, *arguments)
    assert code == 2 and message in err and "Traceback" not in err and err.count("\n") == 1
    assert not out.parent.exists() and "wrote" not in printed


def test_output_that_exists_or_overlaps_is_refused_before_any_work(tmp_path, ckpt, cli, text_file,
                                                                   monkeypatch):
    monkeypatch.setattr(flatten, "measure", lambda *args: pytest.fail("worked"))
    (tmp_path / "there").mkdir()
    for out, message in ((tmp_path / "there", "exists"), (ckpt, "overlap"),
                         (ckpt / "inside", "overlap")):
        code, _, err = cli(flatten.main, "--ckpt", ckpt, "--data", text_file, "--out", out, *SHORT)
        assert code == 2 and message in err


@pytest.fixture
def wide(tmp_path, ckpt, run):
    """A checkpoint saved after flattening, before pruning."""
    out = tmp_path / "wide"
    run(flatten.main, "--ckpt", ckpt, "--ratio", 0.1, "--out", out, "--keep-wide", *SHORT)
    return out


def test_wide_and_ordinary_checkpoints_are_not_mixed_up(tmp_path, wide, run):
    error = run(refit.main, "--ckpt", wide, "--out", tmp_path / "x", *SHORT, expect=2)
    assert "python flatten.py --ckpt" in error and "flattened already" in error
    for option in (["--keep-wide"], ["--ratio", 0.3], ["--max-group", 2]):
        error = run(flatten.main, "--ckpt", wide, "--out", tmp_path / "x", *SHORT, *option,
                    expect=2)
        assert f"{option[0]} is for a model that has not been flattened" in error


def spoil_record(change):
    """Return a function that lets `change` work on the record of a wide checkpoint."""
    def spoil(folder):
        record = record_of(folder)
        change(record)
        (folder / "flatten.json").write_text(json.dumps(record))
    return spoil


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: (folder / "flatten.json").unlink(), "flatten.json"),
    (lambda folder: (folder / "flatten.json").write_text("{}"), "flatten.json"),
    (spoil_record(lambda r: r["groups"].pop()), "flatten.json"),
    (spoil_record(lambda r: r.update(groups=[1])), "flatten.json"),
    (spoil_record(lambda r: r["settings"].update(samples="8")), "samples"),
    (spoil_record(lambda r: r["settings"].update(dtype="int4")), "flatten.json"),
    (spoil_record(lambda r: r["settings"].update(data=5)), "flatten.json"),
    (spoil_record(lambda r: r["settings"].update(data=["x", 5])), "flatten.json"),
    (spoil_record(lambda r: r["settings"].update(ridge="x")), "--ridge"), (poison, "blocks [2]")])
def test_a_spoilt_wide_checkpoint_is_refused(tmp_path, wide, run, spoil, message):
    spoil(wide)
    error = run(flatten.main, "--ckpt", wide, "--out", tmp_path / "out", expect=2)
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_without_options_the_bundled_model_is_flattened_and_only_its_own_result_replaced(
        tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time there is a result already
        code, out, err = cli(flatten.main, "--samples", 2, "--length", 64, "--no-eval")
        assert (code, err) == (0, "") and "blocks 2-3" in out and "18 blocks" in out
    record = tmp_path / "out" / "demo-flat-0.2" / "flatten.json"
    record.write_text(record.read_text().replace("--ckpt ", "--ckpt another/"))
    code, _, err = cli(flatten.main, "--samples", 2, "--length", 64, "--no-eval")
    assert code == 2 and "exists already" in err


def start(*arguments, **options):
    """Start flatten.py in a process of its own."""
    command = [sys.executable, str(ROOT / "flatten.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=ROOT, **options)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_half_checkpoint(tmp_path, text_file, kind):
    path = tiny.checkpoint(tmp_path / "m", num_hidden_layers=40, hidden_size=128,
                           intermediate_size=512)
    out = tmp_path / "results" / "out"
    process = start("--ckpt", path, "--data", text_file, "--samples", 60, "--length", 128,
                    "--no-eval", "--out", out)
    while process.poll() is None and not (out.parent.exists() and os.listdir(out.parent)):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(kind)
    _, err = process.communicate(timeout=60)
    assert not out.exists()
    if kind == signal.SIGKILL:  # nobody can clean up after this; what remains is hidden, no result
        assert all(name.startswith(".out.partial-") for name in os.listdir(out.parent))
    else:
        assert process.returncode == 2 and "interrupted" in err and "Traceback" not in err
        assert not out.parent.exists()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, ckpt, text_file):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    out = tmp_path / "results" / "out"
    process = start("--ckpt", ckpt, "--data", text_file, "--out", out, *SHORT, preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "cannot write" in err and "Traceback" not in err
    assert not out.parent.exists()


@pytest.mark.parametrize("script", ["flatten.py", "calibrate.py", "evaluate.py"])
def test_help_works_from_anywhere(tmp_path, script):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--ckpt" in done.stdout and f"python {script}" in done.stdout


@pytest.mark.parametrize("arguments", [
    ["--ratio", "20%"], ["--samples", "many"], ["--nonsense"], ["surplus"]])
def test_a_mistyped_option_is_one_line(cli, arguments):
    code, out, err = cli(flatten.main, *arguments)
    assert code == 2 and err.count("\n") == 1 and "--help" in err and not out


@pytest.mark.parametrize("script, hint", [
    (flatten, "try fewer --samples or a smaller --length or --max-group 2: "),
    (calibrate, "try fewer --samples or a smaller --length: "),
    (evaluate, "try a smaller --window or --stream: "),
    (harness, "try fewer --samples or a smaller --length: ")])
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")])
def test_without_memory_the_options_that_need_less_are_named(cli, ckpt, monkeypatch, script, hint,
                                                             error):
    def fail(*args):
        raise error
    monkeypatch.setattr(script, "Checkpoint", fail)
    code, _, err = cli(script.main, "--ckpt", ckpt)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: not enough memory; {hint}")


@pytest.mark.parametrize("threads, processes, note", [
    (2, 1, ""), (3, 1, "3 threads on 2 core(s) are slow; set OMP_NUM_THREADS=2"),
    (1, 2, ""), (2, 2, "4 threads on 2 core(s) are slow; set OMP_NUM_THREADS=1"),
    (1, 3, "3 threads on 2 core(s) are slow; start at most 2 process(es)")])
def test_more_threads_than_cores_are_noted_once(cli, ckpt, text_file, monkeypatch, threads,
                                                processes, note):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(console.options, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    console.options.note_threads.cache_clear()
    code, _, err = cli(evaluate.main, "--ckpt", ckpt, ckpt, "--data", text_file, "--window", 32,
                       "--max-windows", 2)
    assert code == 0 and err == (f"note: {note}\n" if note else "")


def test_what_standard_output_cannot_show_does_not_end_a_run(monkeypatch):
    """A file on Windows has few letters, and a model may write any."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="cp1252"))
    console.run(lambda: print("a \u2581 b", flush=True))
    assert out.getvalue().split() == [b"a", b"?", b"b"]


@pytest.mark.parametrize("place", ["demo/checkpoint", "C:\\a b\\checkpoint", None])
def test_the_quick_start_replaces_its_own_result_wherever_it_lies(tmp_path, monkeypatch, place):
    def relpath(path):
        if place is None:
            raise ValueError("path is on mount 'C:', start on mount 'D:'")
        return place
    monkeypatch.setattr(os.path, "relpath", relpath)
    monkeypatch.chdir(tmp_path)
    given = {"data": None, "samples": None, "length": None, "seed": None, "ridge": None,
             "ratio": 0.2, "keep_wide": False, "out": None, "overwrite": False}
    args = argparse.Namespace(**given)
    flatten.quick_start(args)
    assert args.ckpt == (place or str(flatten.BUNDLED)) and not args.overwrite
    for ckpt, ours in ((args.ckpt, True), ("another", False)):
        args.out.mkdir(parents=True, exist_ok=True)
        record = {"command": console.command("flatten.py", ckpt=ckpt, samples=64)}
        (args.out / "flatten.json").write_text(json.dumps(record))
        again = argparse.Namespace(**given)
        flatten.quick_start(again)
        assert again.overwrite == ours


def test_cores_are_counted_on_every_system(monkeypatch):
    counted = console.cores()
    assert 1 <= counted <= os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3}, raising=False)
    assert console.cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    assert console.cores() == os.cpu_count()


def test_other_errors_of_a_library_are_bugs_and_keep_their_traceback(cli, ckpt, monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE")
    monkeypatch.setattr(flatten, "Checkpoint", fail)
    with pytest.raises(RuntimeError, match="INVALID_VALUE"):
        cli(flatten.main, "--ckpt", ckpt)
