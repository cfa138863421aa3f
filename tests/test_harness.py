"""What `python -m compare` measures of a compressed model, and that it measures nothing twice."""
import argparse
import dataclasses
import json
import time

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_compare import randn, random_network

import calibrate
from compare import harness, judge, network, rows, tables
from compare.judge import Judge
from compare.network import Calibration, Measured, Network, whole

NORM, HEAD = "model.norm.weight", "lm_head.weight"
OLD = ("agreement", "divergence")  # what rows of earlier versions lack


def random_windows(n=20, length=40, vocab=300):
    g = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (n, length), generator=g)


def other_outside(dense, **changes):
    return dataclasses.replace(dense, outside=dense.outside | changes)


def judge_of(dense, windows):
    return Judge(dense, {"text": windows}, tiny.runner(dense.config, windows.shape[1]))


def test_the_dense_model_agrees_with_itself():
    dense = random_network(3)
    scores = judge_of(dense, random_windows()).scores(dense)
    assert scores["agreement"] == 1 and scores["divergence"] == 0


def test_a_model_whose_head_is_shuffled_writes_other_tokens():
    dense = random_network(3)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    shuffled = other_outside(dense, **{HEAD: dense.outside[HEAD][order]})
    scores = judge_of(dense, random_windows()).scores(shuffled)
    assert scores["agreement"] < 0.05 and scores["divergence"] > 0.1


def test_agreement_is_the_share_of_equal_tokens_of_texts_written_one_by_one():
    """Without a cache; each model reads what it wrote itself."""
    dense, windows = random_network(3), random_windows(3)
    other = other_outside(dense, **{NORM: dense.outside[NORM] + 0.2 * randn(32, seed=3)})
    judged = judge_of(dense, windows)

    def written(net, ids):
        for _ in range(32):
            ids = torch.cat([ids, net(ids[None])[0, -1].argmax()[None]])
        return ids[-32:]
    nets = [whole(net, judged.runner) for net in (dense, other)]
    equal = [written(nets[0], window[:32]) == written(nets[1], window[:32]) for window in windows]
    expected = float(torch.stack(equal).double().mean())
    assert judged.scores(other)["agreement"] == expected and 0.05 < expected < 0.95


@pytest.mark.parametrize("change", ["norm", "head", "blocks"])
def test_divergence_is_that_of_the_logits_of_both_models(change):
    """Of whole distributions on 16 windows. Each model has its own final norm and head."""
    dense, windows = random_network(3), random_windows()
    norm, head = (dense.outside[name] for name in (NORM, HEAD))
    other = {"norm": other_outside(dense, **{NORM: norm * randn(32).exp()}),
             "head": other_outside(dense, **{HEAD: head + 0.1 * randn(300, 32)}),
             "blocks": dense.with_blocks(dense.blocks[:-1])}[change]
    judged = judge_of(dense, windows)
    some = windows[torch.linspace(0, 19, 16).round().long()]
    log_p, log_q = (whole(net, judged.runner)(some).log_softmax(-1) for net in (dense, other))
    expected = float(F.kl_div(log_q, log_p, log_target=True, reduction="sum")) / some.numel()
    assert judged.scores(other)["divergence"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


@pytest.mark.parametrize("shape, prompts", [
    ((3, 70), (6, 32)), ((1, 20), (1, 20)), ((128, 64), (64, 32)), ((64, 32), (64, 32))])
def test_prompts_are_pieces_of_the_judged_windows(shape, prompts):
    windows = torch.arange(shape[0] * shape[1]).view(shape)
    cut = judge.prompts_of(windows)
    assert tuple(cut.shape) == prompts and int(cut[0, 0]) == 0
    assert (cut == cut[:, :1] + torch.arange(prompts[1])).all()  # neighbours in the text
    assert (cut[:, 0] % shape[1] <= shape[1] - prompts[1]).all()  # within one window
    assert int(cut[-1, 0]) == (shape[0] - 1) * shape[1] + (shape[1] // prompts[1] - 1) * prompts[1]


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


def test_several_calibration_texts_are_mixed_and_the_first_judges(command, tmp_path, cli,
                                                                  text_file, monkeypatch):
    other, seen, of = tmp_path / "other.txt", [], network.Calibration
    other.write_text(tiny.text()[::-1])

    def calibration(tokens, *rest):
        seen.append(tokens)
        return of(tokens, *rest)
    monkeypatch.setattr(harness, "Calibration", calibration)
    run = [*command, "--methods", "shortgpt", "--out", tmp_path / "o"]
    code, table, err = cli(harness.main, *run, "--data", text_file, other)
    assert (code, err) == (0, "")
    assert "4 x 32 tokens of text.txt, first 90% + other.txt, first 90%, judged on 3 windows of " \
        "32 of text.txt, last 10%" in table
    args = argparse.Namespace(data=[str(text_file), str(other)])
    ids, _ = calibrate.read_texts(tmp_path / "tiny", args)
    expected = [calibrate.mixed_tokens(ids, 4, 32, seed) for seed in (0, 0, 1)]  # dense is first
    assert all(map(torch.equal, seen, expected)) and len(seen) == 3
    code, _, err = cli(harness.main, *run)
    assert code == 2 and "calibration" in err  # one text is another experiment


def without_seconds(table):
    return [line.rsplit("|", 2)[0] for line in table.splitlines() if line.startswith("|")]


def test_a_resumed_run_gives_the_same_table(command, tmp_path, cli, monkeypatch):
    methods = ["--methods", "shortgpt", "flattengpt"]
    at_once, in_steps = tmp_path / "at_once", tmp_path / "in_steps"
    for run in ([*methods, "--out", at_once], ["--methods", "shortgpt", "--out", in_steps],
                [*methods, "--out", in_steps]):
        assert cli(harness.main, *command, *run)[0] == 0
    expected, table = ((out / "table.md").read_text() for out in (at_once, in_steps))
    assert without_seconds(table) == without_seconds(expected)
    assert "| agreement | divergence | passes |" in table and "3 prompts of 32 tokens" in table
    assert "| 1.000 | 0.000 | 0.0 |" in table  # dense

    def refuse(*_):
        raise AssertionError("nothing is left to run")
    monkeypatch.setattr(harness, "Judge", refuse)
    assert cli(harness.main, *command, *methods, "--out", in_steps)[0] == 0
    assert (in_steps / "table.md").read_text() == table


def test_results_of_earlier_versions_are_still_read(command, tmp_path, cli):
    out, run = tmp_path / "o", [*command, "--out", tmp_path / "o", "--methods", "shortgpt"]
    assert cli(harness.main, *run)[0] == 0
    old = [{name: value for name, value in row.items() if name not in OLD} for row in results(out)]
    (out / rows.RESULTS).write_text("".join(json.dumps(row) + "\n" for row in old))
    code, table, err = cli(harness.main, *run, "last")
    assert (code, err) == (0, "") and results(out)[:3] == old
    lines = {method: next(line for line in table.splitlines() if f"| {method} |" in line)
             for method in ("shortgpt", "last")}
    assert " |  |  | 1.0 |" in lines["shortgpt"] and " |  |  |" not in lines["last"]
    assert lines["last"].count("|") == lines["shortgpt"].count("|")


@pytest.mark.parametrize("change", [{"agreement": float("nan"), "divergence": 0.1},
                                    {"agreement": 0.5}, {"agreement": 0.5, "divergence": "much"}])
def test_a_row_with_other_numbers_than_these_is_no_result(change):
    row = {"method": "last", "ratio": 0.2, "seed": 0, "commit": "abc", "parameters": 9,
           "removed": 0.2, "blocks": 4, "ordinary": True, "perplexity": {"t": 9.0}, "seconds": 1.0,
           "passes": 0, "settings": {"windows": {"t": 3}}}
    assert rows.is_result(row) and rows.is_result(row | {"agreement": 0.5, "divergence": 0.1})
    assert not rows.is_result(row | change)


def drawn_rows():
    """Return results of four methods at three ratios, two seeds each."""
    cost = {"shortgpt": 5, "flattengpt": 4, "flat-refit": 2, "last": 9}
    made = [{"method": "dense", "ratio": 0.0, "seed": 0, "removed": 0.0, "seconds": 0.0,
             "perplexity": {"t": 20.0}}]
    return made + [{"method": method, "ratio": ratio, "seed": seed, "removed": ratio + 0.01,
                    "seconds": 2.0 + seed, "perplexity": {"t": 20 * (1 + cost * ratio) + seed}}
                   for method, cost in cost.items() for ratio in (0.3, 0.1, 0.2)
                   for seed in (0, 1)]


def test_a_curve_has_one_point_a_ratio_in_order():
    points = tables.curve(drawn_rows(), "shortgpt", "removed", "t")
    assert points == [pytest.approx(point) for point in [(0.11, 30.5), (0.21, 40.5), (0.31, 50.5)]]
    assert tables.curve(drawn_rows(), "last", "seconds", "t")[0] == pytest.approx((2.5, 38.5))


@pytest.mark.parametrize("methods, ratios", [(1, [0.2]), (1, [0.1, 0.2, 0.3]), (4, [0.1, 0.2])])
def test_each_line_against_parameters_starts_at_the_dense_model(tmp_path, monkeypatch, methods,
                                                                ratios):
    axes = pytest.importorskip("matplotlib.axes")
    lines, plot = [], axes.Axes.plot
    monkeypatch.setattr(axes.Axes, "plot", lambda ax, x, y, **style: (
        lines.append((x, y)), plot(ax, x, y, **style))[1])
    names = ["dense", "shortgpt", "flattengpt", "flat-refit", "last"][:methods + 1]
    tables.figures([row for row in drawn_rows() if row["method"] in names
                    and row["ratio"] in [0.0, *ratios]], "t", tmp_path)
    removed, seconds = lines[:methods], lines[methods:]
    assert len(seconds) == methods
    for (x, y), (spent, _) in zip(removed, seconds, strict=True):
        assert x == pytest.approx((0, *(ratio + 0.01 for ratio in ratios))) and y[0] == 20
        assert spent == pytest.approx([2.5] * len(ratios))  # none for the dense model


def test_the_figures_name_their_lines_in_plain_words(tmp_path):
    pytest.importorskip("matplotlib")
    assert "removed.svg" in tables.figures(drawn_rows(), "t", tmp_path)
    for name in ("removed", "seconds"):
        drawing = (tmp_path / f"{name}.svg").read_text()
        for label in ("dense", "blocks dropped (ShortGPT)", "the paper (FlattenGPT)", "last"):
            assert f"<!-- {label} -->" in drawing
    drawing = (tmp_path / "removed.svg").read_text()
    assert "<!-- share of all parameters removed -->" in drawing and "<!-- 20% -->" in drawing
