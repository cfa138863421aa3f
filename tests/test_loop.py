"""Loops over blocks: the dense model at the start, each equation, and runs that can be kept."""
import json
import math
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import beyond.loop
import beyond.recursion
import evaluate
from beyond.loop import loop, looped
from beyond.lora import add_lora
from beyond.recursion import (
    Connector,
    improved,
    judged,
    lesson,
    monotonic_loss,
    recursion,
    token_losses,
)
from model import Block, Transformer
from text.wikitext import held_out_text


def network(blocks: int = 5, dtype=torch.float64, order: list[int] | None = None) -> Transformer:
    """A model whose k-th block has seed order[k], or else k."""
    order = list(range(blocks)) if order is None else order
    cfg = tiny.config(num_hidden_layers=len(order))
    outer = tiny.random_tensors(cfg.outer_shapes(), 100, dtype)
    made = [Block({n: t.to(dtype) for n, t in tiny.block(cfg, seed).items()}, cfg)
            for seed in order]
    return Transformer(cfg, made, outer).requires_grad_(False)


def some_ids(n: int = 3, length: int = 10) -> Tensor:
    return torch.randint(300, (n, length), generator=torch.Generator().manual_seed(0))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def logits_of(net: Transformer, stream: Tensor) -> Tensor:
    return net.head(net.model["norm"](stream))


def moved(net: Transformer) -> Connector:
    """A connector away from its start."""
    connector = Connector(net)
    connector.W.data += 0.3 * numbers(*connector.W.shape)
    connector.gamma.data += numbers(*connector.gamma.shape, seed=1)
    return connector


# ---- without training

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damped", [True, False])
@pytest.mark.parametrize("window", [(0, 0), (1, 3), (0, 4)])
def test_a_loop_that_runs_once_is_the_dense_model_bit_for_bit(window, damped, dtype):
    net, ids = network(dtype=dtype), some_ids()
    assert torch.equal(net.head(looped(net, ids, window, 1, damped)), net(ids))


@pytest.mark.parametrize("times", [1, 2, 3, 7])
def test_a_damped_loop_is_a_shorter_step_taken_more_often(times):
    """g(x) = x + a x is known: damped it gives (1 + a/K)^K x, undamped (1 + a)^K x."""
    x, a = numbers(4, 6), numbers(6, seed=1)
    assert torch.allclose(loop(lambda x: x + a * x, x, times), (1 + a / times) ** times * x)
    assert torch.allclose(loop(lambda x: x + a * x, x, times, False), (1 + a) ** times * x)


def test_an_undamped_loop_is_the_model_with_its_blocks_repeated():
    ids, written_out = some_ids(), network(order=[0, 1, 2, 1, 2, 1, 2, 3, 4])
    assert torch.allclose(network().head(looped(network(), ids, (1, 2), 3, damped=False)),
                          written_out(ids), atol=1e-12)


# ---- passes

@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_every_pass_returns_the_dense_logits_exactly(dtype, lora):
    net, ids = network(dtype=dtype), some_ids()
    dense, connector = net(ids), Connector(net)
    if lora:
        add_lora(net, seed=0)
    ends = recursion(net, connector, ids, 3)
    assert len(ends) == 3
    assert all(torch.equal(logits_of(net, end), dense) for end in ends)


def test_a_connector_is_its_equation():
    net = network(8)
    connector, embedding = moved(net), numbers(2, 3, 32, seed=5)
    streams = [numbers(2, 3, 32, seed=10 + k) for k in range(4)]
    expected = embedding.clone()
    for gamma, W, H in zip(connector.gamma, connector.W, streams, strict=True):
        rms = (H.square().mean(-1, keepdim=True) + net.config.rms_norm_eps).sqrt()
        expected += gamma * torch.einsum("btc,cd->btd", H / rms, W)
    assert connector.places == [2, 4, 6, 8]
    assert torch.allclose(connector(embedding, streams), expected, atol=1e-12)


@pytest.mark.parametrize("blocks, places", [(1, [1]), (2, [1, 2]), (5, [1, 2, 3, 5]),
                                            (24, [6, 12, 18, 24])])
def test_connectors_read_the_stream_after_each_quarter(blocks, places):
    assert Connector(network(order=[0] * blocks)).places == places


def test_a_second_pass_starts_from_what_the_connector_makes_of_the_first():
    net, ids = network(), some_ids()
    connector = moved(net)
    embedding = net.model["embed_tokens"](ids)
    rope = beyond.recursion.rope_table(net.config, 0, ids.shape[1], embedding)

    def streams(x):
        return [x := block(x, rope) for block in net.model["layers"]]
    first = streams(embedding)
    second = streams(connector(embedding, [first[0], first[1], first[2], first[4]]))
    ends = recursion(net, connector, ids, 2)
    assert torch.equal(ends[0], first[-1]) and torch.equal(ends[1], second[-1])
    assert not torch.allclose(ends[0], ends[1])


def test_passes_without_a_connector_are_the_model_repeated():
    ids, net = some_ids(), network()
    ends = recursion(net, None, ids, 2)
    assert torch.allclose(logits_of(net, ends[1]), network(order=[*range(5)] * 2)(ids), atol=1e-12)


# ---- the loss

def test_the_monotonic_loss_by_hand():
    losses = torch.tensor([[2.0, 3.0, 1.0], [1.0, 1.0, 4.0]])  # worse: 3.0 and 4.0, not equal 1.0
    assert float(monotonic_loss(losses, 1.5)) == pytest.approx((2 + 4.5 + 1 + 1 + 1 + 6) / 2)


def test_with_beta_one_the_loss_is_the_sum_of_the_mean_losses_and_never_less():
    losses = numbers(50, 3).abs()
    plain = float(losses.mean(0).sum())
    assert float(monotonic_loss(losses, 1.0)) == pytest.approx(plain)
    assert float(monotonic_loss(losses, 2.0)) > plain
    better = losses.sort(dim=1, descending=True).values  # every pass improves every token
    assert float(monotonic_loss(better, 2.0)) == pytest.approx(plain)


def test_no_gradient_flows_through_the_comparison():
    losses = numbers(40, 3).abs().requires_grad_()
    monotonic_loss(losses, 1.5).backward()
    weights = torch.ones(40, 3, dtype=torch.float64)
    weights[:, 1:][losses[:, 1:] > losses[:, :-1]] = 1.5
    assert torch.allclose(losses.grad, weights / 40)


def test_token_losses_are_cross_entropy_of_each_pass():
    logits, targets = numbers(7, 3, 11), torch.arange(7)
    expected = [F.cross_entropy(logits[:, r], targets, reduction="none") for r in range(3)]
    assert torch.allclose(token_losses(logits, targets), torch.stack(expected, 1))


def test_improved_counts_tokens_that_get_better_at_every_pass():
    losses = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 2.0], [2.0, 3.0, 1.0], [5.0, 4.0, 0.0]])
    assert improved(losses).tolist() == [1.0, 0.75, 0.5]


def test_the_lesson_is_the_loss_written_out():
    net, ids = network(), some_ids()
    connector, learned = moved(net), torch.zeros(3, 10, dtype=torch.bool)
    learned[0, 3:], learned[2, :5] = True, True
    rows = []
    for b, t in learned[:, 1:].nonzero().tolist():
        ends = recursion(net, connector, ids, 2)
        rows.append([F.cross_entropy(logits_of(net, end)[b, t], ids[b, t + 1]) for end in ends])
    expected = monotonic_loss(torch.stack([torch.stack(row) for row in rows]), 1.5)
    loss = lesson(net, connector, 2, partial(monotonic_loss, beta=1.5), ids, learned)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))


def test_the_judge_is_the_mean_over_all_tokens(monkeypatch):
    """However many pieces and batches there are."""
    net, ids = network(), some_ids(5)
    connector = moved(net)
    whole = judged(net, connector, 2, ids, "cpu")
    losses = torch.stack([F.cross_entropy(logits_of(net, end)[:, :-1].flatten(0, 1),
                                          ids[:, 1:].flatten(), reduction="none")
                          for end in recursion(net, connector, ids, 2)], 1)
    assert torch.allclose(whole[0], losses.mean(0))
    assert torch.allclose(whole[1], improved(losses))
    monkeypatch.setattr("model.BATCH_TOKENS", 20)
    monkeypatch.setattr("beyond.lessons.PIECE", 7)
    assert torch.allclose(judged(net, connector, 2, ids, "cpu"), whole)


def test_training_can_start_a_gradient_reaches_the_scales():
    """The projections get theirs once the scales have moved; both at zero would stay there."""
    net, ids = network(), some_ids()
    connector = Connector(net)
    everything = torch.ones_like(ids, dtype=torch.bool)
    lesson(net, connector, 2, partial(monotonic_loss, beta=1.5), ids, everything).backward()
    assert (connector.gamma.grad != 0).all() and (connector.W.grad == 0).all()


# ---- the command

@pytest.fixture
def call(ckpt, tmp_path, text_file, cli):
    """Call the command on a tiny model; returns exit code, stdout, stderr."""
    return partial(cli, beyond.loop.main, "--ckpt", ckpt, "--data", text_file, "--length", 16,
                   "--device", "cpu", "--out", tmp_path / "loop")


TRAIN = ("--passes", 2, "--steps", 4, "--batch", 3, "--rate", 0.01)


def cells(out: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]


def test_the_table_begins_with_the_dense_perplexity(call, ckpt, text_file):
    code, out, err = call("--window", "1-2", "0-3", "--times", 1, 2)
    assert (code, err) == (0, "")
    head, *rows = cells(out)
    assert head == ["blocks", "K = 1", "K = 2"] and [row[0] for row in rows] == ["1-2", "0-3"]
    dense = evaluate.perplexity(ckpt, held_out_text([str(text_file)])[0], 16).perplexity
    assert all(float(row[1]) == pytest.approx(dense, abs=1e-3) for row in rows)
    assert rows[0][2] != rows[1][2] and rows[0][2] != rows[0][1]
    assert "undamped" in call("--window", "1-2", "--undamped")[1]


@pytest.mark.parametrize("options", [(), ("--lora",), ("--lora", "--no-connector")])
def test_a_trained_loop_is_saved_and_can_be_judged_again(call, tmp_path, ckpt, options):
    code, out, err = call(*TRAIN, *options)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "loop").iterdir()) == ["loop.json",
                                                                           "loop.safetensors"]
    record = json.loads((tmp_path / "loop/loop.json").read_text())
    assert record["source_sha256"] == beyond.loop.Checkpoint(ckpt).digest()
    assert record["block_passes"] == 4 * 3 * 16 * 2 * 5 and record["beta"] == 1.5
    assert [float(row[1]) for row in cells(out)[1:]] == [
        pytest.approx(math.exp(loss), rel=1e-4) for loss in record["losses"]]
    again = call("--passes", 2, *options, "--load", tmp_path / "loop", "--out", tmp_path / "other")
    assert cells(again[1]) == cells(out) and not (tmp_path / "other").exists()
    names = load_file(tmp_path / "loop/loop.safetensors").keys()
    assert any("connector" in name for name in names) == ("--no-connector" not in options)
    assert any(".A" in name for name in names) == ("--lora" in options)


def test_training_with_connectors_alone_leaves_the_first_pass_and_lowers_the_loss(call, tmp_path):
    call("--passes", 2, "--steps", 30, "--batch", 8, "--rate", 0.01)
    record = json.loads((tmp_path / "loop/loop.json").read_text())
    first = record["held_out"][0][1]
    assert record["held_out"][-1][1] < first - 0.05


def test_a_result_is_never_replaced(call, tmp_path):
    (tmp_path / "loop").mkdir()
    code, _, err = call(*TRAIN)
    assert code == 2 and "exists already" in err and not any((tmp_path / "loop").iterdir())


def test_a_result_appears_whole_or_not_at_all(call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(beyond.recursion, "write_json", full)
    code, _, err = call(*TRAIN)
    assert code == 2 and "no space" in err and set(tmp_path.iterdir()) == before


def test_a_loop_of_another_model_or_other_parts_is_refused(call, tmp_path):
    call(*TRAIN)
    other = tiny.checkpoint(tmp_path / "other", seed=7)
    load = ("--passes", 2, "--load", tmp_path / "loop")
    code, _, err = call(*load, "--ckpt", other)
    assert code == 2 and "was not trained on" in err and len(err.splitlines()) == 1
    code, _, err = call(*load, "--lora")
    assert code == 2 and "another --lora" in err
    (tmp_path / "loop/loop.safetensors").write_bytes(b"damaged")
    code, _, err = call(*load)
    assert code == 2 and "cannot be read" in err


@pytest.mark.parametrize("options, words", [
    ((), "give --window"), (("--window", "1-2", "--passes", 2), "one of them"),
    (("--window", "3-9"), "no block 9"),
    (("--window", "0-5", "3-4"), "no block 5"), (("--window", "3-1"), "expected first-last"),
    (("--window", "1-2", "--times", 0), "at least 1"), (("--passes", 0), "at least 1"),
    (("--passes", 1), "nothing to train"), (("--passes", 2, "--no-connector"), "nothing to train"),
    (("--passes", 2, "--beta", 0.5), "--beta"), (("--passes", 2, "--data", "x.json"), "JSON")])
def test_impossible_wishes_are_one_line(call, options, words):
    code, _, err = call(*options)
    assert code == 2 and words in err and len(err.splitlines()) == 1
