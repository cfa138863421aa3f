"""Text that the model writes itself: seeded, as it predicts, kept, and never judged by."""
import argparse
import shlex
from dataclasses import replace

import pytest
import tiny
import torch
from test_cli import SHORT, hashes, record_of

import calibrate
import flatten
from beyond import refit
from calibrate import calibration_tokens, mixed_tokens, opening, read_tokens
from checkpoint.reader import Checkpoint
from compare import harness
from console import forecast
from demo import tour
from model import load
from text.added import Added
from text.tokenizer import load_tokenizer
from text.wikitext import held_out_text

OWN = "the model's own text at temperature 1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flattengpt"


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what the model is asked to go on from."""
    found, generate = [], calibrate.generate

    def counted(net, ids, *rest, **options):
        found.append(tuple(ids.shape))
        return generate(net, ids, *rest, **options)
    monkeypatch.setattr(calibrate, "generate", counted)
    return found


def write(path, n, length, seed=0, dtype=None):
    args = argparse.Namespace(data=["self"], samples=n, length=length, seed=seed, device="cpu",
                              dtype=dtype)
    return read_tokens(path, args)[0]


def forget(cache):
    for path in cache.iterdir():
        path.unlink()


def test_the_same_seed_writes_the_same_windows_and_another_seed_or_model_does_not(ckpt, tmp_path,
                                                                                   cache):
    other = tiny.checkpoint(tmp_path / "other", seed=1)
    a, b, c = write(ckpt, 5, 20), write(ckpt, 5, 20, seed=1), write(other, 5, 20)
    files = hashes(cache)
    forget(cache)
    assert torch.equal(write(ckpt, 5, 20), a) and hashes(cache).items() <= files.items()
    assert a.shape == (5, 20) and (a[:, 0] == 1).all()  # BOS
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_a_second_run_reads_what_the_first_has_written(ckpt, calls, cache):
    first = write(ckpt, 5, 20)
    assert torch.equal(write(ckpt, 5, 20), first) and calls == [(5, 1)]
    for settings in ((4, 20), (5, 19), (5, 20, 1), (5, 20, 0, "bfloat16")):  # others are other text
        write(ckpt, *settings)
    assert len(calls) == 5 and len(list(cache.iterdir())) == 5


def test_no_window_is_written_twice_whatever_the_batch_and_the_seed(ckpt, calls, monkeypatch):
    """Chance numbers are those of a batch, so another size of batches writes other windows."""
    monkeypatch.setattr(calibrate, "TOGETHER", 4)
    windows = torch.cat([write(ckpt, 10, 12, seed) for seed in range(3)])
    assert len(windows.unique(dim=0)) == 30 and calls == 3 * [(4, 1), (4, 1), (2, 1)]


def test_tokens_are_as_likely_as_the_model_predicts(ckpt):
    """At temperature 1 the mean of log p over what is drawn is minus the entropy of p."""
    ids, net = write(ckpt, 16, 100), load(ckpt)
    with torch.no_grad():
        predicted = net(ids)[:, :-1].log_softmax(-1)
    drawn = predicted.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(predicted.exp() * predicted).sum(-1)
    assert abs(float((drawn + entropy).mean())) < 0.1  # at 0.8 and 1.25 it is above 0.2
    ends = (ids[:, :-1] == 2).nonzero()
    assert len(ends) and not all((ids[i, t + 1:] == 2).all() for i, t in ends)  # and goes on


def test_of_several_texts_it_has_its_share_and_is_written_last():
    asked, text = [], 1000 + torch.arange(900)

    def own(n, length, seed):
        asked.append((n, length, seed))
        return torch.arange(n)[:, None].expand(n, length)
    tokens = mixed_tokens([own, text], 12, 20, 3)
    assert asked == [(6, 20, 3)]
    assert (tokens.view(6, 2, 20)[:, :, 0] < 1000).sum(dim=1).eq(1).all()  # a turn in each round
    assert tokens[tokens[:, 0] < 1000][:, 0].tolist() == list(range(6))    # in order, each once
    assert torch.equal(tokens[tokens[:, 0] >= 1000], calibration_tokens(text, 6, 20, 3))
    twice = mixed_tokens([own, text, own], 12, 20, 3)
    assert set(asked[1:]) == {(8, 20, 3)} and (twice[:, 0] < 1000).sum() == 8
    asked.clear()
    with pytest.raises(ValueError, match="text 2 of --data has 900"):
        mixed_tokens([own, text], 12, 200, 3)
    assert not asked


def test_it_starts_as_a_document_does(ckpt):
    """So with what the tokenizer puts in front, else with what was between documents."""
    plain = load_tokenizer(ckpt)
    with_end = replace(plain, added=plain.added | {"<|endoftext|>": Added(7)})
    assert opening(with_end, {}) == plain.bos_id == 1
    silent = replace(plain, add_bos=False)
    assert opening(replace(with_end, add_bos=False), {}) == 7
    assert opening(replace(silent, bos_id=5), {"bos_token_id": 3}) == 5
    nameless = replace(silent, bos_id=None)
    assert opening(nameless, {"bos_token_id": 3, "eos_token_id": 4}) == 3
    assert opening(nameless, {"bos_token_id": None, "eos_token_id": 4}) == 4
    assert opening(nameless, {"eos_token_id": [4, 5]}) == 4
    with pytest.raises(ValueError, match="--data self: neither the tokenizer nor config"):
        opening(nameless, {"eos_token_id": [None]})


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: path.write_bytes(path.with_name("other").read_bytes())])
def test_a_damaged_file_is_one_line_that_names_it(ckpt, tmp_path, cli, cache, spoil):
    write(ckpt, 4, 32)
    (other,) = cache.iterdir()
    other.rename(cache / "other")
    write(ckpt, 8, 32)
    (path,) = cache.glob("self-*")
    spoil(path)
    code, _, err = cli(flatten.main, "--ckpt", ckpt, "--data", "self", "--out", tmp_path / "out",
                       *SHORT)
    assert code == 2 and f"{path} is damaged" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_starts_with_another_token_is_not_taken(ckpt, monkeypatch):
    write(ckpt, 4, 32)
    monkeypatch.setattr(calibrate, "opening", lambda *_: 3)
    with pytest.raises(ValueError, match="of another tokenizer"):
        write(ckpt, 4, 32)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_nothing_half_written_stays(ckpt, tmp_path, cli, cache, monkeypatch, stop):
    def fail(*_, **options):
        raise stop
    monkeypatch.setattr(calibrate, "generate", fail)
    code, _, err = cli(flatten.main, "--ckpt", ckpt, "--data", "self", "--out", tmp_path / "out",
                       *SHORT)
    assert code == 2 and err.count("\n") == 1
    assert not any(cache.iterdir()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "lm_head.weight"])
def test_a_broken_model_writes_nothing(ckpt, cache, calls, name):
    def spoil(tensors):
        tensors[name].view(-1)[5] = float("nan")
    tiny.change_tensors(ckpt, spoil)
    with pytest.raises(ValueError, match=f"NaN or infinity in {name.split('.')[0]}"):
        write(ckpt, 4, 32)
    assert not calls and not any(cache.iterdir())


@pytest.mark.parametrize("main", [flatten.main, refit.main])
def test_a_run_says_so_needs_no_other_text_and_can_be_repeated(ckpt, tmp_path, cli, main, cache,
                                                               calls):
    out = tmp_path / "out"
    code, printed, err = cli(main, "--ckpt", ckpt, "--ratio", 0.3, "--data", "self", "--out", out,
                             *SHORT[:-1])
    assert code == 0, err
    assert printed.startswith("no perplexity at the end") and "| checkpoint" not in printed
    assert f"8 x 32 tokens of {OWN}" in printed
    record = record_of(out)
    assert record["calibration"]["text"] == OWN and record["settings"]["data"] == "self"
    words = shlex.split(record["command"])
    for path in (tmp_path / "kept", tmp_path / "written again"):
        assert cli(main, *words[words.index("--ckpt"):], "--out", path)[0] == 0
        assert hashes(path)["model.safetensors"] == hashes(out)["model.safetensors"]
        assert record_of(path)["calibration"] == record["calibration"]
        forget(cache)
    assert len(calls) == 2


def test_of_several_texts_the_first_that_the_model_did_not_write_judges(ckpt, tmp_path, cli, calls,
                                                                        text_file):
    assert held_out_text(["self", str(text_file)]) == held_out_text([str(text_file), "self"])
    out = tmp_path / "out"
    code, printed, err = cli(flatten.main, "--ckpt", ckpt, "--ratio", 0.3, "--data", "self",
                             text_file, "--out", out, *SHORT[:-1])
    assert code == 0, err
    assert f"{OWN} + text.txt, first 90%" in printed and "(text.txt, last 10%" in printed
    assert calls == [(4, 1)] and record_of(out)["settings"]["data"] == ["self", str(text_file)]


def test_step_4_reads_what_the_dense_model_wrote(ckpt, tmp_path, cli, cache, calls):
    run = ["--ckpt", ckpt, "--ratio", 0.3, "--data", "self", *SHORT]
    for name, options in (("one", []), ("wide", ["--keep-wide"])):
        assert cli(flatten.main, *run, "--out", tmp_path / name, *options)[0] == 0
    wide = ["--ckpt", tmp_path / "wide", "--out", tmp_path / "two"]
    assert cli(flatten.main, *wide)[0] == 0
    one, two = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    assert one["calibration"] == two["calibration"] and len(calls) == 1
    assert hashes(tmp_path / "one")["model.safetensors"] == \
        hashes(tmp_path / "two")["model.safetensors"]
    forget(cache)
    code, _, err = cli(flatten.main, *wide, "--overwrite")
    assert code == 2 and "flatten again" in err and err.count("\n") == 1 and len(calls) == 1


def test_methods_are_compared_on_it_and_judged_on_other_texts(ckpt, tmp_path, cli, text_file,
                                                              calls):
    run = ["--ckpt", ckpt, "--methods", "shortgpt", "--samples", 4, "--length", 32, "--seeds", 2,
           "--data", "self", "--out", tmp_path / "o"]
    code, _, err = cli(harness.main, *run)
    assert code == 2 and "cannot judge" in err and not calls
    code, table, err = cli(harness.main, *run, "--also", text_file)
    assert (code, err) == (0, "")
    assert f"4 x 32 tokens of {OWN}, judged on" in table and "of text.txt;" in table
    assert calls == [(4, 1), (4, 1)]  # once a seed


def test_the_tour_fails_before_it_writes(cli, calls):
    code, _, err = cli(tour.main, "--data", "self")
    assert code == 2 and "cannot judge" in err and not calls


def test_a_dry_run_tells_the_memory_of_writing(ckpt, cli, cache):
    config = Checkpoint(ckpt).config
    expected = {"model": 4 * config.parameters(),
                "keys and values": 2 * 16 * 2048 * 5 * 2 * 8 * 4}  # 5 blocks, 2 KV heads of 8
    assert forecast.writing(config, 16, 2048, 4) == expected
    code, told, _ = cli(flatten.main, "--ckpt", ckpt, "--data", "self", "--dry-run")
    assert code == 0 and forecast.row("writing text", expected) in told and not cache.exists()
    code, told, _ = cli(flatten.main, "--ckpt", ckpt, "--dry-run")
    assert code == 0 and "writing text" not in told
