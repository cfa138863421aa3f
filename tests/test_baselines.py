"""Every method: what it must do on models where the answer is known, and that its result is an ordinary checkpoint."""
import dataclasses
import json
import math

import pytest
import tiny
import torch

from baselines import compare, dropping, flattened, merging, width
from baselines.methods import METHODS
from baselines.network import Calibration, Network, whole
from checkpoint.reader import Checkpoint
from evaluate import losses
from model import generate, load

NOT_ORDINARY = {"blockpruner", "streamline-linear", "flap", "flat-wide", "flat-heads-only", "flat-channels-only"}
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def network(blocks, **changes):
    cfg = tiny.config(num_hidden_layers=len(blocks), **changes)
    return Network(cfg, blocks, tiny.random_tensors(cfg.outer_shapes(), 99))


def calibration(net, n=6, length=16, seed=0):
    tokens = torch.randint(net.config.vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(tokens, tiny.runner(net.config, length), len(net.blocks))


def identity(seed):
    """A block that adds nothing, and has nothing in it."""
    weights = tiny.block(tiny.config(), seed)
    return {name: tensor if "norm" in name else torch.zeros_like(tensor) for name, tensor in weights.items()}


def own_text(net, text):
    """What the network itself would say: text to which its blocks matter."""
    return generate(whole(net, text.runner), text.tokens[:, :2], 14)


def logits(net, text):
    return whole(net, text.runner)(text.tokens)


@pytest.fixture
def with_identities():
    """Six blocks; 2 and 3 add nothing."""
    return network([tiny.block(tiny.config(), 0), tiny.block(tiny.config(), 1), identity(2), identity(3),
                    tiny.block(tiny.config(), 4), tiny.block(tiny.config(), 5)])


@pytest.mark.parametrize("method", ["shortgpt", "sleb", "shortened-ppl", "taylor+", "magnitude+", "blockpruner", "fcm"])
def test_blocks_that_add_nothing_go_first_and_cost_nothing(with_identities, method):
    text = calibration(with_identities)
    text.tokens = own_text(with_identities, text)
    if method in ("taylor+", "magnitude+"):  # whose rule protects the ends of so shallow a model
        scores = dropping.taylor(with_identities, text) if method == "taylor+" else torch.tensor(
            [dropping.magnitude(block) for block in with_identities.blocks])
        assert dropping.smallest(scores, 2) == [2, 3]
        return
    smaller = METHODS[method][0](with_identities, 2, text)
    assert len(smaller.blocks) == 4
    assert torch.allclose(logits(smaller, text), logits(with_identities, text), atol=1e-9)


@pytest.mark.parametrize("method", [dropping.streamline_first, dropping.streamline_linear])
def test_a_window_that_adds_nothing_is_replaced_at_no_cost(method):
    dense = network([*(identity(seed) if seed in (2, 3, 4) else tiny.block(tiny.config(), seed) for seed in range(6))])
    text = calibration(dense)
    smaller = method(dense, 2, text)
    assert len(smaller.blocks) == 4 and torch.allclose(logits(smaller, text), logits(dense, text), atol=1e-9)


def test_last_blocks_are_the_last(with_identities):
    text = calibration(with_identities)
    assert dropping.last_blocks(with_identities, 2, text).blocks == with_identities.blocks[:4] and text.passes == 0


@pytest.mark.parametrize("changes", [{}, {"model_type": "llama", "num_key_value_heads": 6}, {"model_type": "qwen3"},
                                     {"tie_word_embeddings": True}])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_model_of_the_right_size(method, changes):
    cfg = tiny.config(**changes)
    dense = network([tiny.block(cfg, seed) for seed in range(6)], **changes)
    before = [{name: tensor.clone() for name, tensor in block.items()} for block in dense.blocks]
    text = calibration(dense)
    smaller = METHODS[method][0](dense, 2, text)
    assert logits(smaller, text).isfinite().all()
    removed = dense.parameters() - smaller.parameters()
    if method not in ("flat-wide", "flat-heads-only", "flat-channels-only", "streamline-linear"):
        assert removed >= 2 * cfg.block_parameters()
        assert removed < 3 * cfg.block_parameters()
    if smaller.ordinary:
        assert {name: tuple(t.shape) for name, t in smaller.blocks[-1].items()} == smaller.config.block_shapes()
        assert smaller.config.parameters() == smaller.parameters()
    assert all(torch.equal(old[name], new[name]) for old, new in zip(before, dense.blocks, strict=True) for name in old)


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
    compare.save(smaller, source, tmp_path / "saved", {"method": method})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.inference_mode():
        assert torch.allclose(theirs(text.tokens).logits, load(tmp_path / "saved")(text.tokens), atol=1e-5)
        assert torch.allclose(theirs(text.tokens).logits, logits(smaller, text), atol=1e-5)


def test_the_plus_rule_protects_the_ends_as_far_as_it_can():
    scores = torch.arange(12.0)
    assert dropping.smallest(dropping.plus_rule(scores, 3), 3) == [4, 5, 6]
    assert torch.isinf(dropping.plus_rule(scores, 3)).nonzero().flatten().tolist() == [0, 1, 2, 3, 10, 11]
    assert len(dropping.smallest(dropping.plus_rule(scores[:5], 2), 2)) == 2
    assert torch.isinf(dropping.plus_rule(scores[:5], 2)).nonzero().flatten().tolist() == [0, 1, 2]


def test_losses_without_a_step_are_those_of_the_model_without_it():
    dense = network([tiny.block(tiny.config(), seed) for seed in range(4)])
    text = calibration(dense)
    found = text.losses_without(dense, dropping.block_steps(dense, text), [0, 2])
    for i in (0, 2):
        rest = dropping.without(dense, [i])
        assert found[i] == pytest.approx(float(losses(whole(rest, text.runner), text.tokens, "cpu").double().mean()))
    assert torch.isinf(found[[1, 3]]).all()


def test_sleb_is_the_greedy_search_written_out():
    dense = network([tiny.block(tiny.config(), seed) for seed in range(5)])
    text, kept = calibration(dense), list(range(5))
    for _ in range(2):
        tried = {i: float(losses(whole(dropping.without(dense, [j for j in range(5) if j not in kept or j == i]),
                                       text.runner), text.tokens, "cpu").mean()) for i in kept[1:-1]}
        kept.remove(min(tried, key=tried.get))
    assert dropping.sleb(dense, 2, text).blocks == [dense.blocks[i] for i in kept]


def test_taylor_is_weight_times_gradient_of_the_mean_loss_over_all_windows():
    dense = network([tiny.block(tiny.config(), seed) for seed in range(2)])
    text = calibration(dense, n=150)  # more than one batch: gradients are summed before their size is taken
    found = dropping.taylor(dense, text)
    net = whole(dense.with_blocks([{k: v.clone() for k, v in block.items()} for block in dense.blocks]), text.runner)
    net.requires_grad_(True)
    logits = net(text.tokens)[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.tokens[:, 1:].flatten()).backward()
    expected = [sum(float((p * p.grad).detach().abs().sum()) for name, p in layer.named_parameters()
                    if name.endswith("proj.weight")) for layer in net.model["layers"]]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_half_of_a_block_is_every_tensor_once():
    names = tiny.config(model_type="qwen3").block_shapes()
    assert {name for name in names if dropping.half_of(name) == 1} == {
        "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}


def test_blockpruner_takes_a_half_that_adds_nothing():
    blocks = [tiny.block(tiny.config(), seed) for seed in range(4)]
    for i, name in ((1, WRITERS[0]), (2, WRITERS[1])):
        blocks[i] = blocks[i] | {name: torch.zeros_like(blocks[i][name])}
    dense = network(blocks)
    text = calibration(dense)
    text.tokens = own_text(dense, text)
    # one block's worth of parameters: both dead halves, if attention and MLP weigh as much together
    smaller = dropping.blockpruner(dense, 1, text)
    dead = sum(t.numel() for i, half in ((1, 0), (2, 1)) for n, t in blocks[i].items() if dropping.half_of(n) == half)
    assert dead == dense.config.block_parameters() and smaller.absent == dead
    assert torch.allclose(logits(smaller, text), logits(dense, text), atol=1e-9)


def test_a_linear_stretch_is_replaced_exactly_by_its_map():
    g = torch.Generator().manual_seed(0)
    x, M = (torch.randn(5, 20, 8, generator=g, dtype=torch.float64), torch.randn(8, 8, generator=g, dtype=torch.float64))
    assert torch.allclose(dropping.linear_map(x, x + x @ M, ridge=1e-14), M, atol=1e-9)
    noisy = x + x @ M + torch.randn(x.shape, generator=g, dtype=torch.float64)
    solution = torch.linalg.lstsq(x.flatten(0, 1), (noisy - x).flatten(0, 1)).solution
    assert torch.allclose(dropping.linear_map(x, noisy, ridge=1e-14), solution, atol=1e-9)


def test_ward_finds_clusters_that_are_far_apart():
    points = torch.tensor([0.0, 5.0, 0.1, 5.2, 9.0])
    distance = (points[:, None] - points).abs()
    assert dropping.ward_clusters(distance, 3) == [[0, 2], [1, 3], [4]]
    assert dropping.ward_clusters(distance, 1) == [[0, 1, 2, 3, 4]]


def test_ward_merges_what_adds_least_variance():
    g = torch.Generator().manual_seed(3)
    points = torch.randn(7, 2, generator=g, dtype=torch.float64)

    def variance(clusters):
        return sum(float((points[c] - points[c].mean(0)).square().sum()) for c in clusters)
    clusters = [[i] for i in range(7)]
    for k in range(6, 2, -1):
        options = [sorted([*(c for c in clusters if c not in (a, b)), sorted(a + b)])
                   for i, a in enumerate(clusters) for b in clusters[i + 1:]]
        clusters = min(options, key=variance)
        assert dropping.ward_clusters(torch.cdist(points, points), k) == clusters


def test_a_merge_of_equal_blocks_is_that_block():
    block = tiny.block(tiny.config(), 0)
    for merged in (merging.differences([block, block, block]), merging.top_with_bottom_norms([block, block]),
                   merging.weighted(block, block, 0.3)):
        assert all(torch.allclose(merged[name], block[name]) for name in block)


def test_lacos_formula_and_what_its_code_computes_differ():
    a, b, c = (tiny.block(tiny.config(), seed) for seed in range(3))
    name = "mlp.up_proj.weight"
    assert torch.allclose(merging.differences([a, b, c])[name], b[name] + c[name] - a[name])
    released = merging.top_with_bottom_norms([a, b, c])
    in_place = a[name].clone()  # theta += (theta_k - theta), one after the other: what is left is the last
    for other in (b, c):
        in_place += other[name] - in_place
    assert torch.allclose(released[name], in_place) and released["input_layernorm.weight"] is a["input_layernorm.weight"]


def test_mkas_share_is_sigmoid_of_half_for_blocks_alike():
    assert merging.mka_share(torch.full((4, 4), 0.9), 2, 3) == pytest.approx(0.6225, abs=1e-4)


def test_quotas_add_up_and_the_largest_share_takes_the_rest():
    assert merging.quotas([0.26, 0.74], 8) == [2, 6] and merging.quotas([0.5, 0.5], 5) == [3, 2]
    assert merging.quotas([1.0, 0.0], 7) == [7, 0] and merging.shares(torch.tensor([0.0, 0.0])) == [0.5, 0.5]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_come_with_all_of_one_member_is_that_member(model_type):
    """With GQA: were query heads tiled over KV heads instead of repeated, they would meet foreign keys."""
    cfg = tiny.config(model_type=model_type)
    a, b = tiny.block(cfg, 0), tiny.block(cfg, 1)
    b |= {name: a[name] for name in a if "layernorm" in name}
    n, F = cfg.num_key_value_heads, cfg.intermediate_size
    merged = merging.come_merge([a, b], [0.0, 1.0], [torch.rand(n)] * 2, [torch.rand(F)] * 2, cfg)
    assert all(torch.allclose(merged[name], b[name]) for name in b)


def test_come_keeps_the_query_heads_that_a_kv_head_serves():
    cfg = tiny.config()
    a, b = tiny.block(cfg, 0), tiny.block(cfg, 1)
    merged = merging.concatenated([a, b], [torch.tensor([1]), torch.tensor([0])], [torch.arange(40), torch.arange(0)],
                                  [0.5, 0.5], cfg)
    q, D = "self_attn.q_proj.weight", cfg.head_dim
    assert torch.equal(merged[q], torch.cat([a[q][3 * D:], b[q][:3 * D]]))
    k = "self_attn.k_proj.bias"
    assert torch.equal(merged[k], torch.cat([a[k][D:], b[k][:D]]))
    assert torch.equal(merged["mlp.down_proj.weight"], a["mlp.down_proj.weight"])


def test_sensitivity_is_activation_times_what_reads_it():
    assert merging.sensitivity(torch.tensor([2.0, 3.0]), torch.tensor([[1.0, -1.0], [2.0, 0.0]])).tolist() == [6.0, 3.0]


def test_the_posterior_share_is_the_best_of_its_grid():
    dense = network([tiny.block(tiny.config(), seed) for seed in range(3)])
    text = calibration(dense)
    merged = merging.come_posterior(dense, 1, text, steps=4)
    similarity = text.measure(dense).similarity
    start = int(similarity.diagonal(2).argmax())
    members, before, after = dense.blocks[start:start + 2], dense.blocks[:start], dense.blocks[start + 2:]
    scores = merging.come_scores(members, text.run(before, text.embedded(dense)), text)
    tried = [dense.with_blocks([*before, merging.come_merge(members, [k / 4, 1 - k / 4], *scores, dense.config), *after])
             for k in range(5)]
    found = [float(losses(whole(net, text.runner), text.tokens, "cpu").double().mean()) for net in (merged, *tried)]
    assert found[0] == pytest.approx(min(found[1:])) and len({round(loss, 6) for loss in found[1:]}) > 1


def test_width_keeps_the_parameter_budget_and_everything_if_nothing_must_go():
    cfg = tiny.config()
    for n in range(1, 4):
        heads, channels = width.narrower(cfg, n)
        new = dataclasses.replace(cfg, num_key_value_heads=heads, num_attention_heads=3 * heads, intermediate_size=channels)
        assert 0 <= (cfg.num_hidden_layers - n) * cfg.block_parameters() - cfg.num_hidden_layers * new.block_parameters() \
            < cfg.num_hidden_layers * 3 * cfg.hidden_size
    assert width.narrower(cfg, 0) == (cfg.num_key_value_heads, cfg.intermediate_size)
    dense = network([tiny.block(cfg, seed) for seed in range(5)])
    text = calibration(dense)
    assert torch.allclose(logits(width.uniform(dense, 0, text), text), logits(dense, text), atol=1e-8)


def test_flaps_bias_is_the_mean_of_what_is_gone():
    g = torch.Generator().manual_seed(0)
    u, W = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (50, 4))
    kept = torch.tensor([0, 2, 5])
    bias = width.mean_bias(u.mean(0), W, kept)
    assert torch.allclose((u[:, kept] @ W[:, kept].T + bias).mean(0), (u @ W.T).mean(0))
    still = torch.zeros(6, dtype=torch.float64)
    assert torch.equal(width.fluctuation(still, W), still)


def test_moments_are_mean_and_variance_over_tokens():
    cfg = tiny.config()
    xs, run = tiny.stream(cfg), tiny.runner(cfg, 12)
    mean, variance = width.moments(lambda x: 2 * x, xs, run)
    flat = 2 * xs.flatten(0, 1)
    assert torch.allclose(mean, flat.mean(0)) and torch.allclose(variance, flat.var(0, correction=0))


def test_ablations_differ_from_the_method_only_in_what_they_leave_out():
    dense = network([tiny.block(tiny.config(), seed) for seed in range(5)])
    text = calibration(dense)
    full = flattened.flattengpt(dense, 2, text)
    wide = flattened.flattengpt(dense, 2, text, heads=False, channels=False)
    assert torch.equal(logits(wide, text), logits(flattened.wide(dense, 2, text), text))
    selected = flattened.flattengpt(dense, 2, text, compensate=False)
    changed = [[name for name in a if not torch.equal(a[name], b[name])]
               for a, b in zip(full.blocks, selected.blocks, strict=True)]
    assert next(filter(None, changed)) == ["mlp.down_proj.weight"]
    pairs = flattened.groups_of(dense, 2, text, 2)
    assert max(map(len, pairs)) == 2
    with pytest.raises(ValueError, match="allow 2 merges, not 3"):
        flattened.groups_of(dense, 3, text, 2)


def test_channel_scores():
    C, down = torch.diag(torch.tensor([4.0, 1.0])).double(), torch.tensor([[3.0, 0.0], [4.0, 2.0]]).double()
    assert flattened.magnitude_score(C, 1.0, down).tolist() == [5.0, 2.0]
    assert flattened.wanda_score(C, 1.0, down).tolist() == [10.0, 2.0]
    assert torch.equal(flattened.random_score(C, 1.0, down), flattened.random_score(C, 2.0, down))


def test_the_plus_methods_drop_inside_the_protected_ends():
    blocks = [identity(seed) if seed in (5, 6) else tiny.block(tiny.config(), seed) for seed in range(10)]
    dense = network(blocks)
    text = calibration(dense)
    text.tokens = own_text(dense, text)
    for method in (dropping.taylor_plus, dropping.magnitude_plus):
        assert method(dense, 2, text).blocks == [blocks[i] for i in (0, 1, 2, 3, 4, 7, 8, 9)]


def test_passes_are_counted():
    dense = network([tiny.block(tiny.config(), seed) for seed in range(4)])
    for method, passes in ((dropping.shortgpt, 1), (flattened.flattengpt, 2), (dropping.shortened_ppl, 6 / 4 + 1)):
        text = calibration(dense)
        method(dense, 1, text)
        assert text.passes == pytest.approx(passes), method


def test_compare_fills_its_table_resumes_and_reports_failures(ckpt, text_file, tmp_path, cli, monkeypatch):
    run = ["--ckpt", ckpt, "--data", text_file, "--samples", 4, "--length", 32, "--windows", 3, "--ratios", 0.15,
           "--methods", "shortgpt", "flattengpt", "flat-pairs", "--out", tmp_path / "out", "--seeds", 2]
    code, out, err = cli(compare.main, *run)
    assert (code, err) == (0, "") and out.count("| 0.15 | ") == 3 and " ± " in out and "| dense |" in out
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(rows) == 7 and (tmp_path / "out" / "table.md").read_text() in out

    def broken(*_):
        raise RuntimeError("no such thing")
    monkeypatch.setitem(METHODS, "last", (broken, "a test"))
    code, out, err = cli(compare.main, *run[:-4], "--out", tmp_path / "out", "--seeds", 2, "--methods", "flattengpt", "last")
    assert (code, err) == (0, "") and "failed: RuntimeError: no such thing" in out
    now = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert now[:7] == rows and len(now) == 9 and all("error" in json.loads(row) for row in now[7:])


@pytest.mark.parametrize("wrong, message", [
    (["--methods", "nonsense"], "unknown method nonsense"), (["--ratios", "2"], "between 0 and 1"),
    (["--seeds", "0"], "--seeds and --trials must be at least 1"), (["--also", "nothing.txt"], "no such file")])
def test_compare_refuses_in_one_line(ckpt, text_file, cli, wrong, message, tmp_path):
    code, _, err = cli(compare.main, "--ckpt", ckpt, "--data", text_file, "--samples", 4, "--length", 32, "--out",
                       tmp_path / "out", *wrong)
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_relative_excess_is_a_ratio_of_logarithms():
    costs = [("dense", 0.0, 0.0), ("flattengpt", 0.2, 0.1), ("flattengpt", 0.2, 0.3), ("last", 0.2, 0.5), ("last", 0.4, 1.0)]
    rows = [{"method": method, "ratio": ratio, "perplexity": {"t": 10 * math.exp(cost)}} for method, ratio, cost in costs]
    text = compare.relative(rows, ["t"])
    assert text.splitlines()[4:] == ["| 0.2 | last | 2.50 |"]
    assert compare.relative(rows[:1], ["t"]) == ""


def test_compare_does_not_mix_results_of_other_settings(ckpt, text_file, cli, tmp_path):
    run = ["--ckpt", ckpt, "--data", text_file, "--length", 32, "--methods", "last", "--ratios", 0.15,
           "--out", tmp_path / "o"]
    assert cli(compare.main, *run, "--samples", 4)[0] == 0
    code, _, err = cli(compare.main, *run, "--samples", 5)
    assert code == 2 and "other settings" in err
