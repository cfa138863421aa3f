"""The methods, on models where the answer is known; and the harness that runs them all."""
import dataclasses
import itertools
import json
import math

import pytest
import tiny
import torch
import torch.nn.functional as F

from checkpoint.reader import Checkpoint
from compare import dropping, flattened, harness, merging, tables, width
from compare.methods import METHODS
from compare.network import Calibration, Network, whole
from evaluate import losses
from model import generate, load

# of five blocks; FinerCut may touch the last two only, and takes them whole
NOT_ORDINARY = {"blockpruner", "2ssp", "streamline-linear", "linearpatch", "flap", "flat-wide",
                "flat-heads-only", "flat-channels-only", "tied-lowrank"}
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def network(blocks, **changes):
    """Return these blocks as a model, with random embeddings."""
    cfg = tiny.config(num_hidden_layers=len(blocks), **changes)
    return Network(cfg, blocks, tiny.random_tensors(cfg.outer_shapes(), 99))


def random_network(L, silent=(), **changes):
    """Return a model of L random blocks, of which the silent ones add nothing to the stream."""
    cfg = tiny.config(**changes)
    blocks = [tiny.block(cfg, seed) for seed in range(L)]
    return network([tiny.silent(block) if i in silent else block
                    for i, block in enumerate(blocks)], **changes)


def calibration(net, n=6, length=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(net.config.vocab_size, (n, length), generator=g)
    return Calibration(tokens, tiny.runner(net.config, length), len(net.blocks))


def own_text(net):
    """Return calibration text that the network wrote itself, so that its blocks matter to it."""
    text = calibration(net)
    text.tokens = generate(whole(net, text.runner), text.tokens[:, :2], 14)
    return text


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(net, text):
    return whole(net, text.runner)(text.tokens)


def mean_loss(net, text):
    """Return the mean loss by the evaluator, on the whole model."""
    return float(losses(whole(net, text.runner), text.tokens, "cpu").double().mean())


@pytest.mark.parametrize("method", ["shortgpt", "sleb", "shortened-ppl", "blockpruner", "fcm"])
def test_blocks_that_add_nothing_go_first_and_cost_nothing(method):
    dense = random_network(6, silent=(2, 3))
    text = own_text(dense)
    smaller = METHODS[method][0](dense, 2, text)
    assert len(smaller.blocks) == 4
    assert torch.allclose(logits(smaller, text), logits(dense, text), atol=1e-9)


def test_blocks_that_add_nothing_have_the_smallest_taylor_score_and_magnitude():
    dense = random_network(6, silent=(2, 3))
    sizes = torch.tensor([dropping.magnitude(block) for block in dense.blocks])
    assert dropping.smallest(sizes, 2) == [2, 3]
    assert dropping.smallest(dropping.taylor(dense, own_text(dense)), 2) == [2, 3]


@pytest.mark.parametrize("method", [dropping.streamline_first, dropping.streamline_linear])
def test_a_window_that_adds_nothing_is_replaced_at_no_cost(method):
    dense = random_network(6, silent=(2, 3, 4))
    text = calibration(dense)
    smaller = method(dense, 2, text)
    assert len(smaller.blocks) == 4
    assert torch.allclose(logits(smaller, text), logits(dense, text), atol=1e-9)


def test_last_blocks_are_the_last():
    dense = random_network(6)
    text = calibration(dense)
    assert dropping.last_blocks(dense, 2, text).blocks == dense.blocks[:4] and text.passes == 0


@pytest.mark.parametrize("changes", [
    {}, {"model_type": "llama", "num_key_value_heads": 6}, {"model_type": "qwen3"},
    {"tie_word_embeddings": True}])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_model_of_the_right_size(method, changes):
    """And the dense model as it was."""
    dense = random_network(6, **changes)
    kept = [*dense.blocks, dense.outside]
    before = [{name: tensor.clone() for name, tensor in weights.items()} for weights in kept]
    text = calibration(dense)
    smaller = METHODS[method][0](dense, 2, text)
    assert logits(smaller, text).isfinite().all()
    if method not in ("flat-wide", "flat-heads-only", "flat-channels-only", "streamline-linear"):
        removed = dense.parameters() - smaller.parameters()
        if method == "linearpatch":
            removed += dense.config.hidden_size ** 2  # its matrix counts, and comes on top
        assert 2 <= removed / dense.config.block_parameters() < 3
    if smaller.ordinary:
        shapes = {name: tuple(tensor.shape) for name, tensor in smaller.blocks[-1].items()}
        assert shapes == smaller.config.block_shapes()
        assert smaller.config.parameters() == smaller.parameters()
    for old, new in zip(before, kept, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_ordinary_results_are_checkpoints_that_transformers_opens(method, tmp_path):
    if method.startswith("flat-ridge"):
        pytest.skip("as flattengpt")
    transformers = pytest.importorskip("transformers")
    source = Checkpoint(tiny.checkpoint(tmp_path / "tiny"))
    dense = Network.of(source)
    text = calibration(dense)
    text.runner = tiny.runner(source.config, 16, torch.float32)
    smaller = METHODS[method][0](dense, 2, text)
    assert smaller.ordinary == (method not in NOT_ORDINARY)
    if method in NOT_ORDINARY:
        pytest.skip("no ordinary checkpoint")
    harness.save(smaller, source, tmp_path / "saved", {"method": method})
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.inference_mode():
        expected = net(text.tokens).logits
        assert torch.allclose(expected, load(tmp_path / "saved")(text.tokens), atol=1e-5)
        assert torch.allclose(expected, logits(smaller, text), atol=1e-5)


def test_the_plus_rule_protects_the_ends_as_far_as_it_can():
    def protected(L, n):
        return dropping.plus_rule(torch.arange(float(L)), n).isinf().nonzero().flatten().tolist()
    assert protected(12, 3) == [0, 1, 2, 3, 10, 11]
    assert protected(6, 1) == [0, 1, 2, 3, 5]  # the inner one of the last two may go
    assert protected(5, 2) == [0, 1, 2]


def test_losses_without_a_step_are_those_of_the_model_without_it():
    dense = random_network(4)
    text = calibration(dense)
    tried = text.losses_without(dense, dropping.block_steps(dense, text), [0, 2])
    for i in (0, 2):
        rest = dense.with_blocks([block for k, block in enumerate(dense.blocks) if k != i])
        assert tried[i] == pytest.approx(mean_loss(rest, text))
    assert torch.isinf(tried[[1, 3]]).all()


def test_sleb_is_the_greedy_search_written_out():
    dense = random_network(5)
    text, kept = calibration(dense), list(range(5))

    def loss_without(i):
        return mean_loss(dense.with_blocks([dense.blocks[k] for k in kept if k != i]), text)
    for _ in range(2):
        kept.remove(min(kept[1:-1], key=loss_without))
    assert dropping.sleb(dense, 2, text).blocks == [dense.blocks[i] for i in kept]


def test_taylor_is_weight_times_gradient_of_the_mean_loss_over_all_windows():
    """The windows make several batches, whose gradients are summed before their size is taken."""
    dense = random_network(2)
    text = calibration(dense, n=150)
    scores = dropping.taylor(dense, text)
    copies = [{name: w.clone() for name, w in block.items()} for block in dense.blocks]
    net = whole(dense.with_blocks(copies), text.runner).requires_grad_(True)
    predicted, targets = net(text.tokens)[:, :-1], text.tokens[:, 1:]
    F.cross_entropy(predicted.flatten(0, 1), targets.flatten()).backward()
    expected = [sum(float((p * p.grad).detach().abs().sum()) for name, p in layer.named_parameters()
                    if name.endswith("proj.weight")) for layer in net.model["layers"]]
    assert scores.tolist() == pytest.approx(expected, rel=1e-6)


def test_half_of_a_block_is_every_tensor_once():
    names = tiny.config(model_type="qwen3").block_shapes()
    mlp = {name for name in names if dropping.half_of(name) == 1}
    assert mlp == {"post_attention_layernorm.weight", "mlp.gate_proj.weight",
                   "mlp.up_proj.weight", "mlp.down_proj.weight"}
    assert all(dropping.half_of(name) == 0 for name in names if name not in mlp)


def test_blockpruner_takes_a_half_that_adds_nothing():
    """An attention and an MLP are silent. Together they have the parameters of one block."""
    blocks = [tiny.block(tiny.config(), seed) for seed in range(4)]
    for i, name in ((1, WRITERS[0]), (2, WRITERS[1])):
        blocks[i] = blocks[i] | {name: torch.zeros_like(blocks[i][name])}
    dense = network(blocks)
    text = own_text(dense)
    smaller = dropping.blockpruner(dense, 1, text)
    assert smaller.absent == dense.config.block_parameters()
    assert torch.allclose(logits(smaller, text), logits(dense, text), atol=1e-9)


def test_a_linear_stretch_is_replaced_exactly_by_its_map():
    x, M = randn(5, 20, 8), randn(8, 8, seed=1)
    assert torch.allclose(dropping.linear_map(x, x + x @ M, ridge=1e-14), M, atol=1e-9)


def test_the_linear_map_is_the_least_squares_one():
    x, noisy = randn(5, 20, 8), randn(5, 20, 8, seed=1)
    solution = torch.linalg.lstsq(x.flatten(0, 1), (noisy - x).flatten(0, 1)).solution
    assert torch.allclose(dropping.linear_map(x, noisy, ridge=1e-14), solution, atol=1e-9)


def test_ward_finds_clusters_that_are_far_apart():
    points = torch.tensor([0.0, 5.0, 0.1, 5.2, 9.0])
    distance = (points[:, None] - points).abs()
    assert dropping.ward_clusters(distance, 3) == [[0, 2], [1, 3], [4]]
    assert dropping.ward_clusters(distance, 1) == [[0, 1, 2, 3, 4]]


def test_ward_merges_what_adds_least_variance():
    points = randn(7, 2, seed=3)

    def variance(clusters):
        return sum(float((points[c] - points[c].mean(0)).square().sum()) for c in clusters)
    clusters = [[i] for i in range(7)]
    for k in range(6, 2, -1):
        options = [sorted([*(c for c in clusters if c not in (a, b)), sorted(a + b)])
                   for a, b in itertools.combinations(clusters, 2)]
        clusters = min(options, key=variance)
        assert dropping.ward_clusters(torch.cdist(points, points), k) == clusters


def test_a_merge_of_equal_blocks_is_that_block():
    block = tiny.block(tiny.config(), 0)
    for merged in (merging.differences([block, block, block]), merging.weighted(block, block, 0.3),
                   merging.top_with_bottom_norms([block, block])):
        assert all(torch.allclose(merged[name], block[name]) for name in block)


def test_lacos_formula_and_what_its_code_computes_differ():
    a, b, c = (tiny.block(tiny.config(), seed) for seed in range(3))
    name = "mlp.up_proj.weight"
    assert torch.allclose(merging.differences([a, b, c])[name], b[name] + c[name] - a[name])
    released = merging.top_with_bottom_norms([a, b, c])
    in_place = a[name].clone()
    for other in (b, c):
        in_place += other[name] - in_place  # what is left is the last
    assert torch.allclose(released[name], in_place)
    assert released["input_layernorm.weight"] is a["input_layernorm.weight"]


def test_mkas_share_is_sigmoid_of_half_for_blocks_alike():
    assert merging.mka_share(torch.full((4, 4), 0.9), 2, 3) == pytest.approx(0.6225, abs=1e-4)


def test_quotas_add_up_and_the_largest_share_takes_the_rest():
    assert merging.quotas([0.26, 0.74], 8) == [2, 6] and merging.quotas([0.5, 0.5], 5) == [3, 2]
    assert merging.quotas([1.0, 0.0], 7) == [7, 0]


def test_members_without_any_influence_have_equal_shares():
    assert merging.shares(torch.tensor([0.0, 0.0])) == [0.5, 0.5]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_come_with_all_of_one_member_is_that_member(model_type):
    """With GQA, query heads that were tiled over KV heads would meet foreign keys."""
    cfg = tiny.config(model_type=model_type)
    a, b = tiny.block(cfg, 0), tiny.block(cfg, 1)
    b |= {name: a[name] for name in a if "layernorm" in name}
    heads, channels = torch.rand(cfg.num_key_value_heads), torch.rand(cfg.intermediate_size)
    merged = merging.come_merge([a, b], [0.0, 1.0], [heads] * 2, [channels] * 2, cfg)
    assert all(torch.allclose(merged[name], b[name]) for name in b)


def test_come_keeps_the_query_heads_that_a_kv_head_serves():
    cfg = tiny.config()
    a, b = tiny.block(cfg, 0), tiny.block(cfg, 1)
    heads, channels = [torch.tensor([1]), torch.tensor([0])], [torch.arange(40), torch.arange(0)]
    merged = merging.concatenated([a, b], heads, channels, [0.5, 0.5], cfg)
    q, D = "self_attn.q_proj.weight", cfg.head_dim
    assert torch.equal(merged[q], torch.cat([a[q][3 * D:], b[q][:3 * D]]))
    k = "self_attn.k_proj.bias"
    assert torch.equal(merged[k], torch.cat([a[k][D:], b[k][:D]]))
    assert torch.equal(merged["mlp.down_proj.weight"], a["mlp.down_proj.weight"])


def test_sensitivity_is_activation_times_what_reads_it():
    sizes, weight = torch.tensor([2.0, 3.0]), torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    assert merging.sensitivity(sizes, weight).tolist() == [6.0, 3.0]


def test_the_posterior_share_is_the_best_of_its_grid():
    dense = random_network(3)
    text = calibration(dense)
    merged = merging.come_posterior(dense, 1, text, steps=4)
    start = int(text.measure(dense).similarity.diagonal(2).argmax())
    before, members, after = (dense.blocks[:start], dense.blocks[start:start + 2],
                              dense.blocks[start + 2:])
    scores = merging.come_scores(members, text.run(before, text.embedded(dense)), text)
    tried = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        block = merging.come_merge(members, [share, 1 - share], *scores, dense.config)
        tried.append(mean_loss(dense.with_blocks([*before, block, *after]), text))
    assert mean_loss(merged, text) == pytest.approx(min(tried))
    assert len({round(loss, 6) for loss in tried}) > 1


def narrow(cfg, heads, channels):
    """Return the config of a model whose blocks keep this many KV heads and channels."""
    group = cfg.num_attention_heads // cfg.num_key_value_heads
    return dataclasses.replace(cfg, num_key_value_heads=heads, num_attention_heads=group * heads,
                               intermediate_size=channels)


CHANGES = [{"model_type": "llama"}, {}, {"model_type": "qwen3"}]  # biases; norms of heads


@pytest.mark.parametrize("changes", CHANGES)
def test_nothing_gets_narrower_if_nothing_must_go(changes):
    cfg = tiny.config(**changes)
    tiny.expect("KV heads and channels of each block, if no block must go",
                (cfg.num_key_value_heads, cfg.intermediate_size), width.narrower(cfg, 0))


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("n, heads", [(1, 2), (2, 1), (3, 1), (4, 1)])
def test_width_keeps_the_parameter_budget(changes, n, heads):
    """What is left of the budget would not pay for one more channel in every block."""
    cfg = tiny.config(**changes, intermediate_size=80)
    kept, channels = width.narrower(cfg, n)
    tiny.expect(f"KV heads of 2 if {n} of 5 blocks must go", heads, kept)
    L, gone = cfg.num_hidden_layers, n * cfg.block_parameters()
    lost = cfg.parameters() - narrow(cfg, kept, channels).parameters()
    assert gone <= lost < gone + L * 3 * cfg.hidden_size, (
        f"parameters lost by 5 blocks with {kept} KV heads and {channels} channels each\n"
        f"expected: the {gone} of {n} blocks, and less than {3 * cfg.hidden_size} more a block\n"
        f"came:     {lost}")


def test_a_methods_own_biases_count_and_some_channel_must_stay():
    cfg, biases = tiny.config(), 2 * 32
    heads, channels = width.narrower(cfg, 1, biases)
    left = 4 * cfg.block_parameters() - 5 * (narrow(cfg, heads, channels).block_parameters()
                                             + biases)
    assert 0 <= left < 5 * 3 * 32, f"parameters left\nexpected: 0 to 479\ncame:     {left}"
    with pytest.raises(ValueError):
        width.narrower(cfg, 5)


def test_width_keeps_everything_if_nothing_must_go():
    dense = random_network(5)
    text = calibration(dense)
    same = width.uniform(dense, 0, text)
    assert torch.allclose(logits(same, text), logits(dense, text), atol=1e-8)


def test_flaps_bias_is_the_mean_of_what_is_gone():
    u, W, kept = randn(50, 6), randn(4, 6, seed=1), torch.tensor([0, 2, 5])
    bias = width.mean_bias(u.mean(0), W, kept)
    assert torch.allclose((u[:, kept] @ W[:, kept].T + bias).mean(0), (u @ W.T).mean(0))


def test_flaps_fluctuation_is_variance_times_the_squares_of_a_column():
    W = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 4.0]])
    assert width.fluctuation(torch.tensor([0.5, 1.0, 0.0]), W).tolist() == [1.0, 4.0, 0.0]


def test_moments_are_mean_and_variance_over_tokens():
    cfg = tiny.config()
    xs, run = tiny.stream(cfg), tiny.runner(cfg, 12)
    mean, variance = width.moments(lambda x: 2 * x, xs, run)
    flat = 2 * xs.flatten(0, 1)
    assert torch.allclose(mean, flat.mean(0))
    assert torch.allclose(variance, flat.var(0, correction=0))


def test_pruning_neither_heads_nor_channels_is_flattening_alone():
    dense = random_network(5)
    text = calibration(dense)
    unpruned = flattened.flattengpt(dense, 2, text, heads=False, channels=False)
    assert torch.equal(logits(unpruned, text), logits(flattened.wide(dense, 2, text), text))


def test_without_compensation_only_down_proj_of_a_merged_block_differs():
    """In the first merged block. The blocks after it see another stream, so more may differ."""
    dense = random_network(5)
    text = calibration(dense)
    full = flattened.flattengpt(dense, 2, text)
    selected = flattened.flattengpt(dense, 2, text, compensate=False)
    changed = [[name for name in a if not torch.equal(a[name], b[name])]
               for a, b in zip(full.blocks, selected.blocks, strict=True)]
    assert next(filter(None, changed)) == ["mlp.down_proj.weight"]


def test_max_group_limits_the_groups_and_says_how_many_merges_that_allows():
    dense = random_network(5)
    text = calibration(dense)
    assert max(map(len, flattened.groups_of(dense, 2, text, 2))) == 2
    with pytest.raises(ValueError, match="allow 2 merges, not 3"):
        flattened.groups_of(dense, 3, text, 2)


def test_channel_scores():
    C = torch.diag(torch.tensor([4.0, 1.0])).double()
    down = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).double()
    assert flattened.magnitude_score(C, 1.0, down).tolist() == [5.0, 2.0]
    assert flattened.wanda_score(C, 1.0, down).tolist() == [10.0, 2.0]
    a, b = flattened.random_score(C, 1.0, down), flattened.random_score(C, 2.0, down)
    assert torch.equal(a, b)


@pytest.mark.parametrize("method", [dropping.taylor_plus, dropping.magnitude_plus])
def test_the_plus_methods_drop_inside_the_protected_ends(method):
    dense = random_network(10, silent=(5, 6))
    kept = [dense.blocks[i] for i in (0, 1, 2, 3, 4, 7, 8, 9)]
    assert method(dense, 2, own_text(dense)).blocks == kept


@pytest.mark.parametrize("method, passes", [
    (dropping.shortgpt, 1), (flattened.flattengpt, 2), (dropping.shortened_ppl, 6 / 4 + 1)])
def test_passes_are_counted(method, passes):
    dense = random_network(4)
    text = calibration(dense)
    method(dense, 1, text)
    assert text.passes == pytest.approx(passes)


def test_passes_of_trial_merges_are_counted():
    """Of 8 windows 4 make and 2 judge. Two sizes, 9 blocks merged twice, 8 judged through."""
    damage = dict.fromkeys([(0, 1), (1, 2), (2, 3), (0, 2)], 0.0)
    passes = flattened.passes_of_trials(damage, torch.zeros(8, 600), 4)
    assert passes == 2 * (4 + 2) / 8 + (2 * 9 * 4 + 8 * 2) / 8 / 4


def test_trial_merges_are_made_once_for_all_ratios(monkeypatch):
    """Two and three merges of six blocks try the same groups, the control and four merges not."""
    dense, calls, try_merges = random_network(6), [], flattened.try_merges
    monkeypatch.setattr(flattened, "try_merges",
                        lambda *a, **options: calls.append(a[3]) or try_merges(*a, **options))
    texts = [calibration(dense, 4) for _ in range(4)]
    for text, n, first_only in zip(texts, [2, 3, 3, 4], [False, False, True, False], strict=True):
        text.measured = texts[0].measured
        flattened.refit(dense, n, text, by_damage=True, first_only=first_only)
    assert calls == [2, 3, 4]  # the second cell made none
    two, three = (try_merges(dense, texts[0].tokens, texts[0].runner, n) for n in (2, 3))
    assert two == three
    assert texts[0].passes == texts[1].passes and texts[1].saved > 0
    assert [text.saved for text in texts if text is not texts[1]] == [0, 0, 0]


def test_compare_fills_its_table_resumes_and_reports_failures(ckpt, text_file, tmp_path, cli,
                                                              monkeypatch):
    folder = tmp_path / "out"
    run = ["--ckpt", ckpt, "--data", text_file, "--samples", 4, "--length", 32, "--windows", 3,
           "--ratios", 0.15, "--seeds", 2, "--out", folder]
    code, out, err = cli(harness.main, *run, "--methods", "shortgpt", "flattengpt", "flat-pairs")
    assert (code, err) == (0, "") and (folder / "table.md").read_text() in out
    assert out.count("| 0.15 | ") == 3 and " ± " in out and "| dense |" in out
    rows = (folder / "results.jsonl").read_text().splitlines()
    assert len(rows) == 7  # dense, and three methods with two seeds

    def broken(*_):
        raise RuntimeError("no such thing")
    monkeypatch.setitem(METHODS, "last", (broken, "a test"))
    code, out, err = cli(harness.main, *run, "--methods", "flattengpt", "last")
    assert (code, err) == (0, "") and "failed: RuntimeError: no such thing" in out
    now = (folder / "results.jsonl").read_text().splitlines()
    assert now[:7] == rows and len(now) == 9
    assert all("error" in json.loads(row) for row in now[7:])


@pytest.mark.parametrize("line", [
    "[1]", "{}", '{"method": "last", "ratio": 0.2, "seed": 0, "commit": "abc", "error": 5}'])
def test_compare_refuses_a_file_of_results_that_it_did_not_write(ckpt, text_file, tmp_path, cli,
                                                                line):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text(line + "\n")
    code, _, err = cli(harness.main, "--ckpt", ckpt, "--data", text_file, "--samples", 4,
                       "--length", 32, "--out", tmp_path / "out")
    assert code == 2 and "line 1 is not a result of this program" in err and err.count("\n") == 1


@pytest.mark.parametrize("wrong, message", [
    (["--methods", "nonsense"], "unknown method nonsense"), (["--ratios", "2"], "between 0 and 1"),
    (["--seeds", "0"], "--seeds and --trials must be at least 1"),
    (["--also", "nothing.txt"], "nothing.txt: no such file"),
    (["--save", __file__], "is not a folder"), (["--save", f"{__file__}/x/y"], "is not a folder")])
def test_compare_refuses_in_one_line(ckpt, text_file, cli, wrong, message, tmp_path):
    code, _, err = cli(harness.main, "--ckpt", ckpt, "--data", text_file, "--samples", 4,
                       "--length", 32, "--out", tmp_path / "out", *wrong)
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_relative_excess_is_a_ratio_of_logarithms():
    costs = [("dense", 0.0, 0.0), ("flattengpt", 0.2, 0.1), ("flattengpt", 0.2, 0.3),
             ("last", 0.2, 0.5), ("last", 0.4, 1.0)]
    rows = [{"method": method, "ratio": ratio, "perplexity": {"t": 10 * math.exp(cost)}}
            for method, ratio, cost in costs]
    text = tables.relative(rows, ["t"])
    assert text.splitlines()[4:] == ["| 0.2 | last | 2.50 |"]
    assert tables.relative(rows[:1], ["t"]) == ""


def test_compare_does_not_mix_results_of_other_settings(ckpt, text_file, cli, tmp_path):
    run = ["--ckpt", ckpt, "--data", text_file, "--length", 32, "--methods", "last",
           "--ratios", 0.15, "--out", tmp_path / "o"]
    assert cli(harness.main, *run, "--samples", 4)[0] == 0
    code, _, err = cli(harness.main, *run, "--samples", 5)
    assert code == 2 and "other settings" in err
    assert '{"samples": 4' in err and '{"samples": 5' in err and "trials" not in err
    path = tmp_path / "o" / "results.jsonl"
    path.write_text(path.read_text().replace('"trials": 16, ', ""))  # an earlier version's
    code, _, err = cli(harness.main, *run, "--samples", 4)
    assert code == 2 and '{"trials": null} there, {"trials": 16} here' in err
