"""Loops over blocks: the dense model at the start, each equation, and runs that can be kept."""
import json
import math
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import beyond.loop
import beyond.recursion
import beyond.training
import evaluate
from beyond.loop import Loop, looped
from beyond.lora import add_lora
from beyond.recursion import Connector, improved, judge, monotonic_loss, recursion, token_losses
from model import Block, Transformer, rope_table


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

def with_loop(net: Transformer, first: int, last: int, times: int, damped: bool) -> Transformer:
    net.model["layers"] = looped(net.model["layers"], first, last, times, damped)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damped", [True, False])
@pytest.mark.parametrize("first, last", [(0, 0), (1, 3), (0, 4)])
def test_a_loop_that_runs_once_is_the_dense_model_bit_for_bit(first, last, damped, dtype):
    net, ids = network(dtype=dtype), some_ids()
    dense = net(ids)
    assert torch.equal(with_loop(net, first, last, 1, damped)(ids), dense)


class Scaling(nn.Module):
    """Stands in for a block: g(x) = x + a x."""

    def __init__(self, a: Tensor):
        super().__init__()
        self.a = a

    def forward(self, x: Tensor, rope: None) -> Tensor:
        return x + self.a * x


@pytest.mark.parametrize("times", [1, 2, 3, 7])
def test_a_damped_loop_is_a_shorter_step_taken_more_often(times):
    """Of g(x) = x + a x it makes (1 + a/K)^K x, and undamped (1 + a)^K x."""
    x, a = numbers(4, 6), numbers(6, seed=1)
    blocks = nn.ModuleList([Scaling(a)])
    assert torch.allclose(Loop(blocks, times, True)(x, None), (1 + a / times) ** times * x)
    assert torch.allclose(Loop(blocks, times, False)(x, None), (1 + a) ** times * x)


def test_an_undamped_loop_is_the_model_with_its_blocks_repeated():
    ids, written_out = some_ids(), network(order=[0, 1, 2, 1, 2, 1, 2, 3, 4])
    assert torch.allclose(with_loop(network(), 1, 2, 3, False)(ids), written_out(ids), atol=1e-12)


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
    streams = [numbers(2, 3, 32, seed=10 + l) for l in range(9)]
    expected = embedding.clone()
    for gamma, W, H in zip(connector.gamma, connector.W, streams[2::2], strict=True):
        rms = (H.square().mean(-1, keepdim=True) + net.config.rms_norm_eps).sqrt()
        expected += gamma * torch.einsum("btc,cd->btd", H / rms, W)
    assert connector.places == [2, 4, 6, 8]
    assert torch.allclose(connector(embedding, streams), expected, atol=1e-12)


@pytest.mark.parametrize("blocks, places", [(1, [1]), (2, [1, 2]), (5, [1, 2, 3, 5]),
                                            (24, [6, 12, 18, 24])])
def test_connectors_read_the_stream_after_each_quarter(blocks, places):
    assert Connector(network(order=[0] * blocks)).places == places


def test_each_pass_starts_from_the_embedding_and_the_pass_before():
    net, ids = network(), some_ids()
    connector = moved(net)
    embedding = net.model["embed_tokens"](ids)
    rope = rope_table(net.config, 0, ids.shape[1], embedding)

    def streams(x):
        return [x, *(x := block(x, rope) for block in net.model["layers"])]
    first = streams(embedding)
    second = streams(connector(embedding, first))
    third = streams(connector(embedding, second))
    ends = recursion(net, connector, ids, 3)
    for end, xs in zip(ends, (first, second, third), strict=True):
        assert torch.equal(end, xs[-1])
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


def test_improved_counts_tokens_that_get_better_at_every_pass():
    losses = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 2.0], [2.0, 3.0, 1.0], [5.0, 4.0, 0.0]])
    assert improved(losses).tolist() == [1.0, 0.75, 0.5]


def losses_of(net: Transformer, connector: Connector, ids: Tensor) -> Tensor:
    """The losses of two passes, (n, 2), in one go."""
    logits = [logits_of(net, end)[:, :-1] for end in recursion(net, connector, ids, 2)]
    return torch.stack([F.cross_entropy(z.transpose(1, 2), ids[:, 1:], reduction="none")
                        for z in logits], 2).flatten(0, 1)


def test_token_losses_are_the_cross_entropy_of_each_pass():
    net, ids = network(), some_ids()
    connector = moved(net)
    losses = token_losses(net, connector, 2, ids)
    assert torch.allclose(losses.double(), losses_of(net, connector, ids), atol=1e-5)
    assert (losses[:, 0] - losses[:, 1]).abs().max() > 0.1


def test_the_judge_is_the_mean_over_all_tokens(monkeypatch):
    """However many pieces and batches there are."""
    net, ids = network(), some_ids(5)
    connector = moved(net)
    losses = losses_of(net, connector, ids)
    expected = [*losses.mean(0).tolist(), *improved(losses).tolist()]

    def judged() -> list[float]:
        losses, shares = judge(net, connector, 2, ids, "cpu")
        return losses + shares
    assert judged() == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr("model.BATCH_TOKENS", 20)
    monkeypatch.setattr("beyond.lessons.PIECE", 7)
    assert judged() == pytest.approx(expected, abs=1e-5)


def test_training_can_start_a_gradient_reaches_the_scales():
    """The projections get theirs once the scales have moved; both at zero would stay there."""
    net, ids = network(), some_ids()
    connector = Connector(net)
    monotonic_loss(token_losses(net, connector, 2, ids), 1.5).backward()
    assert (connector.gamma.grad != 0).all() and (connector.W.grad == 0).all()


# ---- the commands

def cells(out: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]


@pytest.fixture
def loop(ckpt, text_file, cli):
    """Call beyond.loop on a tiny model; returns exit code, stdout, stderr."""
    return partial(cli, beyond.loop.main, "--ckpt", ckpt, "--data", text_file, "--length", 16,
                   "--max-windows", 8, "--device", "cpu")


@pytest.fixture
def train(ckpt, tmp_path, text_file, cli):
    """Call beyond.recursion on a tiny model, in the same way."""
    return partial(cli, beyond.recursion.main, "--ckpt", ckpt, "--data", text_file, "--length", 16,
                   "--device", "cpu", "--steps", 4, "--batch", 3, "--rate", 0.01, "--out",
                   tmp_path / "new" / "loop.safetensors", "--rows", tmp_path / "rows.jsonl")


def test_the_table_begins_with_the_dense_perplexity(loop, ckpt, text_file):
    code, out, err = loop("--window", "1-2", "0-3", "--times", 1, 2)
    assert (code, err) == (0, "")
    head, dense, *rows = cells(out)
    assert head == ["blocks", "K", "damped", "undamped"] and dense[:2] == ["dense", "1"]
    assert [row[:2] for row in rows] == [["1-2", "1"], ["1-2", "2"], ["0-3", "1"], ["0-3", "2"]]
    score = evaluate.perplexity(ckpt, text_file.read_text(), 16, 8).perplexity
    assert float(dense[2]) == pytest.approx(score, abs=1e-3)
    assert rows[0][2:] == rows[2][2:] == [dense[2], dense[2]]
    assert len({dense[2], *rows[1][2:], *rows[3][2:]}) == 5


@pytest.mark.parametrize("options", [(), ("--lora",), ("--lora", "--no-connector"),
                                     ("--lora", "--dtype", "bfloat16")])
def test_what_is_trained_is_saved_and_the_same_command_judges_it_again(train, tmp_path, ckpt,
                                                                      options):
    code, out, err = train(*options)
    assert (code, err) == (0, "")
    path = tmp_path / "new" / "loop.safetensors"
    with safe_open(path, "pt") as file:
        names, run = file.keys(), json.loads(file.metadata()["run"])
        facts = json.loads(file.metadata()["facts"])
    assert any("connector.W" in name for name in names) == ("--no-connector" not in options)
    assert any("q_proj.A" in name for name in names) == ("--lora" in options)
    assert not any("embed_tokens" in name or "frozen" in name for name in names)
    assert run["source_sha256"] == beyond.recursion.Checkpoint(ckpt).digest()
    assert facts["tokens"] == 4 * 3 * 16
    again = train(*options, "--judge", 3)[1]
    assert again.startswith(out) and len(cells(again)) == len(cells(out)) + 1 == 4
    assert [path] == list(path.parent.iterdir())
    assert path.stat().st_mode == (tmp_path / "rows.jsonl").stat().st_mode
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [math.exp(loss) for loss in rows[1]["losses"]] == [
        pytest.approx(float(row[1]), rel=1e-4) for row in cells(again)[1:]]
    assert rows[0]["losses"] == rows[1]["losses"][:2] and rows[0]["improved"][0] == 1


def test_training_lowers_the_loss_of_the_second_pass_and_connectors_leave_the_first(train,
                                                                                    tmp_path):
    train("--steps", 30, "--batch", 8)
    first, second = json.loads((tmp_path / "rows.jsonl").read_text())["losses"]
    assert second < first - 0.05


def test_a_token_made_worse_weighs_beta_in_training(train, tmp_path):
    for beta in (1, 3):
        train("--beta", beta, "--out", tmp_path / f"{beta}.safetensors")
    losses = [json.loads(row)["losses"] for row in (tmp_path / "rows.jsonl").open()]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(train, tmp_path, monkeypatch):
    expected = cells(train("--lora")[1])
    (tmp_path / "new" / "loop.safetensors").unlink()
    draw, left = beyond.training.draw, [3]

    def killed(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(*args)
    monkeypatch.setattr(beyond.training, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(beyond.training, "draw", killed)
    code, _, err = train("--lora")
    assert code == 2 and "last save; the same command goes on there" in err
    left[0] = 1  # one step is left, so a run from the start would be killed again
    code, out, _ = train("--lora")
    assert code == 0 and cells(out) == expected


def test_what_was_trained_is_never_replaced(train, tmp_path, monkeypatch):
    train()
    monkeypatch.setattr(beyond.recursion, "load", None)  # told before the model is loaded
    path = tmp_path / "new" / "loop.safetensors"
    before = path.read_bytes()
    other = tiny.checkpoint(tmp_path / "other", seed=7)
    for options, words in ((("--lora",), "another lora"), (("--ckpt", other), "source_sha256"),
                           (("--steps", 5), "another steps")):
        code, _, err = train(*options)
        assert code == 2 and words in err and len(err.splitlines()) == 1
        assert path.read_bytes() == before
    path.write_bytes(b"damaged")
    code, _, err = train()
    assert code == 2 and "cannot be read" in err and path.read_bytes() == b"damaged"
    assert "choose another --out, or delete it if a run has left it" in err


def test_rows_that_cannot_be_written_are_told_before_loading(train, tmp_path, monkeypatch):
    monkeypatch.setattr(beyond.recursion, "load", None)
    for rows in (tmp_path, tmp_path / "new" / "loop.safetensors"):
        code, _, err = train("--rows", rows)
        assert code == 2 and f"--rows {rows} is a folder or the output" in err
    assert not (tmp_path / "new").exists()


def test_a_second_run_into_one_file_is_refused_as_long_as_the_first_lives(train, tmp_path):
    with beyond.training.alone(tmp_path / "new" / "loop.safetensors", ""):
        code, _, err = train()
        assert code == 2 and "another run is writing" in err and len(err.splitlines()) == 1
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("options, words", [
    ((), "required: --window"), (("--window", "3-9"), "blocks 0-4"),
    (("--window", "0-5", "3-4"), "blocks 0-4"), (("--window", "3-1"), "expected FIRST-LAST"),
    (("--window", "1-2", "--times", 0), "at least 1"),
    (("--window", "1-2", "--max-windows", 0), "at least one window"),
    (("--window", "1-2", "--length", 1), "at least 2 tokens")])
def test_impossible_loops_are_one_line(loop, options, words):
    code, _, err = loop(*options)
    assert code == 2 and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("options, words", [
    (("--passes", 0), "at least 1"), (("--judge", 0), "at least 1"),
    (("--beta", 0.5), "at least 1"), (("--beta", "inf"), "at least 1"),
    (("--passes", 1), "nothing to train"), (("--no-connector",), "nothing to train"),
    (("--steps", 0), "at least 1"),
    (("--data", "x.json"), "plain text"), (("--max-windows", 0), "at least one window")])
def test_impossible_training_is_one_line(train, tmp_path, options, words):
    code, _, err = train(*options)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "rows.jsonl").exists()
