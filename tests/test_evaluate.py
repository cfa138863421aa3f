"""Perplexity equals a plain transformers loop, streamed or not."""
import math

import pytest
import tiny
import torch
import torch.nn.functional as F

import evaluate
from checkpoint.reader import Checkpoint
from evaluate import main, perplexity, window_losses, windows_of
from text.tokenizer import load_tokenizer
from text.wikitext import evaluation_text


def plain_loop(path, text, window, limit=None):
    """Write the field's protocol out on transformers' model. Returns perplexity and windows.

    The perplexity is exp of the mean over windows of their mean losses.
    """
    transformers = pytest.importorskip("transformers")
    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor(load_tokenizer(path).encode(text))
    losses = []
    with torch.no_grad():
        for k in range(len(ids) // window)[:limit]:
            part = ids[k * window:(k + 1) * window]
            losses.append(float(F.cross_entropy(net(part[None]).logits[0, :-1], part[1:])))
    return math.exp(sum(losses) / len(losses)), len(losses)


def test_windows_do_not_overlap_and_the_tail_is_dropped():
    assert windows_of(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows_of(torch.arange(11), 3, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="fewer than one window"):
        windows_of(torch.arange(2), 3)


@pytest.mark.parametrize("length", [5, 1024, 1025, 1026, 2500])
def test_losses_in_pieces_are_the_mean_over_the_window(length):
    """A model of four words that gives one of them a chance of 1/2, and each other one 1/6."""
    ids = torch.randint(0, 4, (2, length), generator=torch.Generator().manual_seed(0))
    guesses = ids.roll(-1, dims=1)  # right, but for every third token of the second window
    guesses[1, ::3] = (guesses[1, ::3] + 1) % 4
    pieces = []

    def logits_of(states):
        pieces.append(states[..., 0].numel())
        return states * math.log(3)
    came = window_losses(logits_of, F.one_hot(guesses, 4).float(), ids)
    n, wrong = length - 1, len(range(0, length - 1, 3))
    expected = [math.log(2), ((n - wrong) * math.log(2) + wrong * math.log(6)) / n]
    tiny.expect(f"losses of two windows of {length} tokens", torch.tensor(expected), came)
    tiny.expect("predictions made", 2 * n, sum(pieces))
    assert max(pieces) <= 1024, \
        f"tokens whose logits exist at once\nexpected: at most 1024\ncame:     {max(pieces)}"


@pytest.mark.parametrize("length", [5, 1500])
def test_divergence_is_the_kl_between_the_predictions_of_two_models(length):
    """Each has a readout of its own. Windows of 1500 tokens are read in pieces."""
    g = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(2, 3, length, 4, generator=g)
    A, B = torch.randn(2, 4, 7, generator=g)
    log_p, log_q = (xs @ A).log_softmax(-1), (ys @ B).log_softmax(-1)
    expected = float(F.kl_div(log_q, log_p, log_target=True, reduction="sum")) / (3 * length)

    def divergence(xs, W, ys, V):
        return evaluate.divergence(lambda x: x @ W, xs, lambda y: y @ V, ys, torch.device("cpu"))
    assert divergence(xs, A, ys, B) == pytest.approx(expected, rel=1e-5)
    assert divergence(xs, A, xs, A) == 0


@pytest.mark.parametrize("window", [16, 100])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "qwen3"}])
def test_perplexity_equals_the_plain_loop_streamed_or_not(tmp_path, window, changes):
    path = tiny.checkpoint(tmp_path / "m", **changes)
    expected, n = plain_loop(path, tiny.text(1000), window)
    scores = [perplexity(path, tiny.text(1000), window, stream=stream) for stream in (False, True)]
    tiny.expect("perplexity, the whole model in memory", expected, scores[0].perplexity, rtol=1e-5,
                atol=0)
    tiny.expect("windows", n, scores[0].windows)
    tiny.expect("perplexity, one block in memory", scores[0].perplexity, scores[1].perplexity,
                rtol=0, atol=0)


def test_streamed_losses_read_each_block_once(ckpt, monkeypatch):
    source, read = Checkpoint(ckpt), []
    block = source.block
    monkeypatch.setattr(source, "block", lambda i: read.append(i) or block(i))
    windows = torch.randint(3, 300, (4, 50), generator=torch.Generator().manual_seed(0))
    losses = evaluate.losses_streamed(source, windows, "cpu", torch.float32)
    tiny.expect("the shape of the losses of 4 windows", (4,), tuple(losses.shape))
    tiny.expect("blocks in the order in which they are read", [0, 1, 2, 3, 4], read)


@pytest.mark.skipif(not tiny.DATA.exists(), reason="needs the trained checkpoints and WikiText-2")
@pytest.mark.parametrize("name", ["stories260K", "wiki24"])
def test_real_perplexity_equals_the_plain_loop(name):
    path = tiny.DATA / "models" / name
    text, _ = evaluation_text(str(tiny.DATA / "wikitext-2-raw"))
    expected, _ = plain_loop(path, text[:60000], 256, 12)
    for stream in (False, True):
        score = perplexity(path, text[:60000], 256, 12, dtype=torch.float32, stream=stream)
        assert score.perplexity == pytest.approx(expected, rel=1e-5) and score.windows == 12


def test_the_table_has_a_row_a_checkpoint_and_marks_subsets(tmp_path, text_file, cli):
    paths = [tiny.checkpoint(tmp_path / name, seed)
             for seed, name in enumerate(("first", "second"))]
    code, out, _ = cli(main, "--ckpt", *paths, "--data", text_file, "--window", 64,
                       "--max-windows", 3, "--prompt", "abc")
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    names = [row.split(" | ")[0] for row in rows]
    assert code == 0 and names == ["| checkpoint", "| first", "| second"]
    assert f"{perplexity(paths[1], tiny.text(), 64, 3).perplexity:.4f}" in rows[2]
    for words in ("SUBSET: the first 3 windows only", "windows of 64 tokens", "float32",
                  "first: abc", "second: abc"):
        assert words in out


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_a_loss_that_is_not_a_number_is_an_error(ckpt, text_file, cli, flags):
    def spoil(tensors):
        tensors["lm_head.weight"][7] = float("nan")
    tiny.change_tensors(ckpt, spoil)
    code, _, err = cli(main, "--ckpt", ckpt, "--data", text_file, "--window", 64, *flags)
    assert code == 2 and "NaN" in err and err.count("\n") == 1


def test_a_loss_too_large_for_a_perplexity_is_an_error(ckpt, text_file, cli):
    def enlarge(tensors):
        tensors["lm_head.weight"] *= 1e4
    tiny.change_tensors(ckpt, enlarge)
    code, _, err = cli(main, "--ckpt", ckpt, "--data", text_file, "--window", 64)
    assert code == 2 and "the perplexity" in err


@pytest.mark.parametrize("arguments, message", [
    (["--window", 1], "--window"), (["--max-windows", 0], "--max-windows"),
    (["--window", 10**6], "fewer than one window")])
def test_impossible_requests_are_one_line(ckpt, text_file, cli, arguments, message):
    code, out, err = cli(main, "--ckpt", ckpt, "--data", text_file, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and "|" not in out


def test_a_wrong_second_checkpoint_is_noticed_before_the_first_is_run(ckpt, text_file, cli,
                                                                      monkeypatch):
    monkeypatch.setattr(evaluate, "perplexity", lambda *args: pytest.fail("ran"))
    assert cli(main, "--ckpt", ckpt, ckpt.parent / "none", "--data", text_file)[0] == 2
