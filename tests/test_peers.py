"""The controls of our fit, and methods that patch, swap or mask: each against its definition."""
import dataclasses
import itertools
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_compare import calibration, logits, mean_loss, network, own_text, randn, random_network

from beyond import refit, regression
from beyond.regression import ridge_of
from compare import dropping, fisher, flattened, patching, swaps, width
from compare.methods import METHODS
from compare.network import whole
from evaluate import through
from flatten import WRITES, fold_norms

O_PROJ, DOWN_PROJ = WRITES
CHANGES = [{}, {"model_type": "llama", "num_key_value_heads": 6}, {"model_type": "qwen3"}]


def ridge_optimum(z, t, W, multiple):
    """Return the V that minimises E|z V - t|^2 + ridge |V - W|^2, the ridge as more rows."""
    scale = (multiple * float(z.square().sum(1).mean()) / z.shape[1]) ** 0.5
    rows = torch.cat([z / len(z) ** 0.5, scale * torch.eye(z.shape[1], dtype=z.dtype)])
    targets = torch.cat([t / len(z) ** 0.5, scale * W])
    return torch.linalg.lstsq(rows, targets).solution


def only_first(members, xs, dense, run, **options):
    fit = refit.Fit(dense, run, first_only=True, **options)
    return tiny.merge(members, xs, run, fit.attention, fit.mlp)


# ---- controls

@torch.no_grad()
def test_the_first_member_is_fitted_to_what_all_members_add():
    """Its o_proj and down_proj are the ridge optima; all else is what it was."""
    cfg, ridge = tiny.config(), 0.03
    members, run = [tiny.block(cfg, seed) for seed in range(3)], tiny.runner(cfg, 20)
    xs = tiny.stream(cfg, 8, 20)
    dense, x, start = xs.clone(), xs.clone(), xs.clone()
    added = 0
    for member in members:
        added = added + run.block(member).attend(x, run.rope)
        x = through([member], x, run)
    fitted, kept = only_first(members, xs, dense, run, ridge=ridge, parts=("eliminate", "dense"))
    assert torch.allclose(dense, x)
    first = fold_norms(members[0])
    assert all(torch.equal(fitted[name], first[name]) for name in first if name not in WRITES)
    block = run.block(first)
    z = block.self_attn.heads(block.input_layernorm(start), run.rope).flatten(0, 1)
    once = ridge_of(z.shape[1], xs, ridge)
    expected = ridge_optimum(z, added.flatten(0, 1), first[O_PROJ].T, once)
    # fitted twice: each time the ridge pulls to the weights of the time before
    expected = ridge_optimum(z, added.flatten(0, 1), expected, refit.AGAIN * once)
    assert torch.allclose(fitted[O_PROJ].T, expected)
    middle = start + (z @ expected).view_as(start)
    psi = block.mlp.channels(block.post_attention_layernorm(middle)).flatten(0, 1)
    left = (x - middle).flatten(0, 1)
    once = ridge_of(psi.shape[1], xs, ridge)
    expected = ridge_optimum(psi, left, first[DOWN_PROJ].T, once)
    expected = ridge_optimum(psi, left, expected, refit.AGAIN * once)
    assert torch.allclose(fitted[DOWN_PROJ].T, expected)
    assert kept["kv_heads"] == [[0, 1]] and kept["channels"] == [list(range(40))]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_first_member_that_does_all_the_work_stays_what_it_is(changes):
    cfg = tiny.config(**changes)
    members, run = [tiny.block(cfg, 0), tiny.silent(tiny.block(cfg, 1))], tiny.runner(cfg, 20)
    xs = tiny.stream(cfg, 8, 20)
    expected = through(members, xs, run)
    fitted, _ = only_first(members, xs, xs.clone(), run)
    assert torch.allclose(xs, expected)
    assert {name: tuple(tensor.shape) for name, tensor in fitted.items()} == cfg.block_shapes()


def test_drop_refit_keeps_the_first_of_each_group_of_the_paper():
    dense = random_network(6)
    text = calibration(dense)
    groups = flattened.groups_of(dense, 2, text)
    control = flattened.refit(dense, 2, text, first_only=True, parts=("eliminate", "dense"))
    assert len(control.blocks) == len(groups) == 4
    for block, group in zip(control.blocks, groups, strict=True):
        first = dense.blocks[group[0]]
        if len(group) == 1:
            assert block is first
        else:
            folded = fold_norms(first)
            assert all(torch.equal(block[name], folded[name]) for name in block
                       if name not in WRITES)


def test_drop_refit_by_damage_measures_what_leaving_out_does():
    """Block 0 does nothing: good to join with the next one, but not to be left alone of the two."""
    dense = random_network(4, silent=(0,))
    text = calibration(dense, n=20)
    joined = flattened.refit(dense, 1, text, by_damage=True)
    assert joined.blocks[0] is not dense.blocks[0] and joined.blocks[1:] == dense.blocks[2:]
    control = flattened.refit(dense, 1, text, by_damage=True, first_only=True)
    assert control.blocks[0] is dense.blocks[0]


@pytest.mark.parametrize("changes", CHANGES)
def test_width_refit_changes_nothing_if_nothing_must_go(changes):
    dense = random_network(4, **changes)
    text = calibration(dense)
    assert torch.allclose(logits(width.refit(dense, 0, text), text), logits(dense, text), atol=1e-8)


@pytest.mark.parametrize("changes", [
    *CHANGES, {"model_type": "qwen3", "num_key_value_heads": 6}])
def test_width_refit_finds_the_heads_and_channels_that_do_all_the_work(changes):
    """The others write nothing, wherever they are."""
    cfg = tiny.config(num_hidden_layers=4, **changes)
    heads, channels = width.narrower(cfg, 2)
    columns = cfg.num_attention_heads // cfg.num_key_value_heads * cfg.head_dim
    blocks = [tiny.block(cfg, seed) for seed in range(4)]
    for seed, block in enumerate(blocks):
        order = torch.Generator().manual_seed(seed)
        dead_heads = torch.randperm(cfg.num_key_value_heads, generator=order)[heads:]
        dead_channels = torch.randperm(cfg.intermediate_size, generator=order)[channels:]
        for head in dead_heads.tolist():
            block[O_PROJ][:, head * columns:(head + 1) * columns] = 0
        block[DOWN_PROJ][:, dead_channels] = 0
    dense = network(blocks, **changes)
    text = calibration(dense, n=30)
    narrow = width.refit(dense, 2, text)
    assert channels < cfg.intermediate_size and heads < cfg.num_key_value_heads
    for block in narrow.blocks:
        shapes = {name: tuple(tensor.shape) for name, tensor in block.items()}
        assert shapes == narrow.config.block_shapes()
    assert torch.allclose(logits(narrow, text), logits(dense, text), atol=1e-8)


@torch.no_grad()
def test_width_refit_is_closer_to_the_dense_stream_than_width_pruning():
    dense = random_network(5)
    text = calibration(dense, n=60)
    target = text.run(dense.blocks, text.embedded(dense))

    def error(narrow):
        return float((text.run(narrow.blocks, text.embedded(narrow)) - target).square().mean())
    assert error(width.refit(dense, 1, text)) < 0.8 * error(width.uniform(dense, 1, text))


# ---- patches around a gap

@pytest.mark.parametrize("method", ["replaceme", "linearpatch", "prune-comp"])
def test_a_gap_that_added_nothing_needs_no_patch(method):
    dense = random_network(6, silent=(2, 3, 4))
    text = calibration(dense)
    smaller = METHODS[method][0](dense, 2, text)
    assert torch.allclose(logits(smaller, text), logits(dense, text), atol=1e-8)


@torch.no_grad()
def test_replacemes_map_is_the_least_squares_one_folded_into_down_proj():
    dense = random_network(5)
    text = calibration(dense, n=20)
    smaller = patching.replaceme(dense, 2, text)
    old = [block is other for block, other in zip(smaller.blocks, dense.blocks, strict=False)]
    last = old.index(False)                       # the one that is patched, before the gap
    assert smaller.blocks[last + 1:] == dense.blocks[last + 3:]
    block, changed = dense.blocks[last], smaller.blocks[last]
    assert [name for name in block if not torch.equal(block[name], changed[name])] == [DOWN_PROJ]
    ys = text.run(dense.blocks[:last], text.embedded(dense))
    text.runner.attend(block, ys)
    M = patching.mlp_output(block, ys, text.runner).flatten(0, 1)
    after = text.run(dense.blocks[last:last + 3], text.run(dense.blocks[:last],
                                                          text.embedded(dense)))
    target = (after - ys).flatten(0, 1)
    T = torch.linalg.lstsq(M, target).solution
    new = patching.mlp_output(changed, ys, text.runner).flatten(0, 1)
    least = float((M @ T - target).square().sum())
    assert float((new - target).square().sum()) == pytest.approx(least, rel=1e-6)
    assert least < 0.9 * float((M - target).square().sum())
    assert torch.allclose(changed[DOWN_PROJ], T.T @ block[DOWN_PROJ], atol=1e-3)


def test_replacemes_gap_is_the_one_whose_ends_are_most_alike_but_never_at_the_bottom():
    dense = random_network(6, silent=(0, 4))  # without block 0 there would be nothing to patch
    dense.blocks[0] = dense.blocks[0] | {DOWN_PROJ: 1e-6 * tiny.block(dense.config, 7)[DOWN_PROJ]}
    smaller = patching.replaceme(dense, 1, calibration(dense))
    assert [block is old for block, old in zip(smaller.blocks, dense.blocks[:4] + dense.blocks[5:],
                                               strict=True)] == [True] * 3 + [False, True]


@pytest.mark.parametrize("C, block", [(1, 1), (8, 8), (12, 4), (576, 64), (128, 128)])
def test_hadamard_is_orthogonal_and_of_equal_entries_within_its_blocks(C, block):
    H = patching.hadamard(C)
    assert torch.allclose(H @ H.T, torch.eye(C, dtype=H.dtype)) and torch.equal(H, H.T)
    assert (H != 0).sum() == C * block
    assert torch.allclose(H[H != 0].abs(), torch.tensor(block ** -0.5, dtype=H.dtype))


def test_a_scaling_of_the_rotated_stream_is_found_exactly():
    H, d, xs = patching.hadamard(12), torch.rand(12).double() + 0.5, randn(3, 20, 12)
    P = patching.rotated_scaling(xs, xs @ H @ torch.diag(d) @ H.T)
    assert torch.allclose(P, H @ torch.diag(d) @ H.T)


def test_size_ratios_are_means_over_windows_of_ratios_of_means_over_tokens():
    xs, ys = randn(3, 5, 4), randn(3, 5, 4, seed=1)
    expected = [sum(float(ys[n, :, c].abs().sum() / xs[n, :, c].abs().sum()) for n in range(3)) / 3
                for c in range(4)]
    assert patching.size_ratios(xs, ys).tolist() == pytest.approx(expected)


def test_linearpatch_leaves_out_what_its_window_says_and_counts_its_matrix():
    dense = random_network(6)
    text = calibration(dense)
    smaller = patching.linearpatch(dense, 2, text)
    start = int(text.measure(dense).similarity.diagonal(2).argmax())
    assert smaller.blocks[:start] == dense.blocks[:start]
    assert smaller.blocks[start + 1:] == dense.blocks[start + 2:]
    x = text.run(dense.blocks[:start], text.embedded(dense))
    y = text.run(dense.blocks[start:start + 2], x.clone())
    patched = text.run(smaller.blocks[start:start + 1], x.clone())
    assert torch.allclose(patched, x @ patching.rotated_scaling(x, y))
    removed = dense.parameters() - smaller.parameters()
    assert removed == 2 * dense.config.block_parameters() - dense.config.hidden_size ** 2


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_prune_and_comp_is_the_papers_scaling_of_all_that_is_before_the_gap(tied):
    """Written out: embeddings and writes before the gap times s, and a tied head undone."""
    dense = random_network(5, tie_word_embeddings=tied, rms_norm_eps=1e-30)
    text = calibration(dense)
    smaller = patching.prune_and_comp(dense, 2, text)
    blocks, outside = list(dense.blocks), dict(dense.outside)
    embed, norm = "model.embed_tokens.weight", "model.norm.weight"
    scales = []
    for _ in range(2):
        streams = [outside[embed][text.tokens]]
        for block in blocks:
            streams.append(through([block], streams[-1], text.runner))
        alike = [float(torch.cosine_similarity(x, y, dim=-1).mean())
                 for x, y in itertools.pairwise(streams)]
        i = alike.index(max(alike))
        s = float((streams[i + 1].abs().mean(1) / streams[i].abs().mean(1)).mean())
        outside[embed] = outside[embed] * s
        if tied:
            outside[norm] = outside[norm] / s
        blocks[:i + 1] = [block | {name: s * block[name] for name in WRITES}
                          for block in blocks[:i]]
        scales.append(s)
    theirs = dataclasses.replace(dense.with_blocks(blocks), outside=outside)
    assert all(abs(s - 1) > 0.05 for s in scales)
    assert torch.allclose(logits(smaller, text), logits(theirs, text))
    assert smaller.outside is dense.outside and smaller.ordinary


# ---- halves

def test_jensen_shannon_is_the_mean_divergence_from_the_mean():
    p, q = randn(4, 9).softmax(-1), randn(4, 9, seed=1).softmax(-1)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert torch.allclose(dropping.jensen_shannon(p.log(), q.log()), expected)
    apart = torch.tensor([[0.0, -1e3], [-1e3, 0.0]]).double()
    assert float(dropping.jensen_shannon(apart[0], apart[1])) == pytest.approx(math.log(2))


@torch.no_grad()
def test_finercut_is_the_greedy_search_written_out():
    dense = random_network(6, silent=(1,))  # which is protected all the same
    text = calibration(dense)
    block_size = dense.config.block_parameters()
    reference = logits(dense, text).log_softmax(-1)
    sizes = [sum(t.numel() for name, t in dense.blocks[0].items() if dropping.half_of(name) == half)
             for half in (0, 1)]

    def without(gone):
        blocks = [block | {WRITES[half]: torch.zeros_like(block[WRITES[half]])
                           for half in (0, 1) if (i, half) in gone}
                  for i, block in enumerate(dense.blocks)]
        return logits(dense.with_blocks(blocks), text)

    def distance(gone):
        return float(dropping.jensen_shannon(reference, without(gone).log_softmax(-1)).mean())
    gone = []
    while sum(sizes[half] for _, half in gone) < 2 * block_size:
        free = [(i, half) for i in (3, 4, 5) for half in (0, 1) if (i, half) not in gone]
        gone.append(min(free, key=lambda half: distance([*gone, half])))
    smaller = dropping.finercut(dense, 2, text)
    assert torch.allclose(logits(smaller, text), without(gone), atol=1e-9)


def test_finercut_takes_what_moves_no_prediction():
    dense = random_network(6, silent=(4, 5))
    text = calibration(dense)
    smaller = dropping.finercut(dense, 2, text)
    assert smaller.ordinary and smaller.blocks == dense.blocks[:4]


def test_finercut_reaches_for_protected_blocks_when_no_others_are_left():
    dense = random_network(3)
    assert len(dropping.finercut(dense, 2, calibration(dense)).blocks) == 1


def test_2ssp_leaves_out_as_many_attentions_as_its_rule_says():
    """LLaMA-2-7B: 32 * 0.25^(2.016 / 1.5) = 4.97, and 32 * 0.125^(2.016 / 1.5) = 1.96."""
    cfg = tiny.config(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, head_dim=128,
                      num_attention_heads=32, num_key_value_heads=32, model_type="llama")
    attention = 4 * 4096 ** 2 + 4096
    assert width.attentions_to_drop(cfg, 8, attention) == 5
    assert width.attentions_to_drop(cfg, 4, attention) == 2


def test_2ssp_does_not_take_more_by_attentions_than_must_go():
    cfg = tiny.config(model_type="llama", num_key_value_heads=6, num_hidden_layers=6)
    attention = 4 * 32 * 48 + 32
    assert round(6 * (2 / 6) ** (3872 / (attention * 1.5))) == 4
    assert width.attentions_to_drop(cfg, 2, attention) == 3  # 2 * 10048 // 6176


@torch.no_grad()
def test_norms_over_tokens_are_summed_over_windows():
    cfg, xs = tiny.config(), tiny.stream(tiny.config())
    run = tiny.runner(cfg, 12)
    weights = tiny.block(cfg, 0)
    block = run.block(weights)
    psi = block.mlp.channels(block.post_attention_layernorm(xs))
    expected = sum(window.square().sum(0).sqrt() for window in psi)
    found = width.norms_over_tokens(refit.channel_features(weights, run), xs, run)
    assert torch.allclose(found, expected)


def test_2ssp_takes_dead_channels_and_dead_attentions():
    cfg = tiny.config(num_hidden_layers=6)
    attention = sum(math.prod(shape) for name, shape in cfg.block_shapes().items()
                    if dropping.half_of(name) == 0)
    drop = width.attentions_to_drop(cfg, 2, attention)
    blocks = [tiny.block(cfg, seed) for seed in range(6)]
    for block in blocks:
        block["mlp.up_proj.weight"][20:] = 0
    for i in range(1, 1 + drop):
        blocks[i] |= {O_PROJ: torch.zeros_like(blocks[i][O_PROJ])}
    blocks[0] |= {DOWN_PROJ: torch.zeros_like(blocks[0][DOWN_PROJ])}  # stays: it is an MLP
    dense = network(blocks)
    text = own_text(dense)
    smaller = width.two_stages(dense, 2, text)
    assert drop > 0 and smaller.absent == drop * attention
    assert 20 <= smaller.config.intermediate_size < 40
    assert torch.allclose(logits(smaller, text), logits(dense, text), atol=1e-9)


# ---- masks

@torch.no_grad()
@pytest.mark.parametrize("changes", CHANGES)
def test_mask_gradients_are_those_of_each_windows_loss(changes):
    """By central differences, with what a mask multiplies put into o_proj or down_proj."""
    dense = random_network(3, **changes)
    cfg, text, step = dense.config, calibration(dense, n=3), 1e-5
    with torch.enable_grad():
        heads, channels = fisher.mask_gradients(dense, text)
    size = cfg.num_attention_heads // cfg.num_key_value_heads * cfg.head_dim
    for i, unit, name, columns, gradients in (
            (0, 1, O_PROJ, slice(size, 2 * size), heads),
            (2, 0, O_PROJ, slice(0, size), heads),
            (1, 17, DOWN_PROJ, slice(17, 18), channels)):
        def moved(by, i=i, name=name, columns=columns):
            changed = dense.blocks[i][name].clone()
            changed[:, columns] *= 1 + by
            blocks = list(dense.blocks)
            blocks[i] = blocks[i] | {name: changed}
            net = whole(dense.with_blocks(blocks), text.runner)
            predicted = net(text.tokens)[:, :-1].transpose(1, 2)
            return F.cross_entropy(predicted, text.tokens[:, 1:], reduction="none").mean(1)
        expected = (moved(step) - moved(-step)) / (2 * step)
        assert gradients[i].shape == (3, cfg.num_key_value_heads if name == O_PROJ else 40)
        assert torch.allclose(gradients[i][:, unit], expected, atol=1e-5, rtol=1e-3)


def test_rearrangement_lets_units_go_whose_gradients_cancel():
    gradients = torch.tensor([[3.0, -3.0, 1.0], [0.0, 0.1, 0.5]])
    assert fisher.units_that_stay(gradients, 1).tolist() == [2]
    assert fisher.units_that_stay(gradients, 2).tolist() == [0, 1]
    assert fisher.units_that_stay(gradients, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_rearrangement_is_never_worse_than_the_search_it_starts_from(seed):
    gradients = randn(4, 9, seed=seed)

    def loss(gone):
        return float(gradients[:, gone].sum(1).square().sum())
    for keep in (3, 6):
        stay = fisher.units_that_stay(gradients, keep).tolist()
        start = gradients.square().sum(0).argsort()[:9 - keep].tolist()
        assert len(stay) == keep
        assert loss([i for i in range(9) if i not in stay]) <= loss(start)


@torch.no_grad()
def test_tuned_factors_are_the_ridge_optimum_over_units():
    cfg = tiny.config()
    run, xs, weights = tiny.runner(cfg, 12), tiny.stream(cfg), tiny.block(cfg, 0)
    text, target = calibration(random_network(1), length=12), randn(4, 12, 32, seed=3)
    for name, features, size in ((O_PROJ, refit.head_features(weights, run), 24),
                                 (DOWN_PROJ, refit.channel_features(weights, run), 1)):
        z, W = features(xs).flatten(0, 1), weights[name].T
        added = torch.stack([z[:, u:u + size] @ W[u:u + size] for u in range(0, len(W), size)], -1)
        # the mean is over tokens, not over numbers: hence the factor C
        factors = ridge_optimum(added.flatten(0, 1) * 32 ** 0.5,
                                target.flatten()[:, None] * 32 ** 0.5,
                                torch.ones(len(W) // size, 1).double(), fisher.RIDGE)
        tuned = fisher.tuned(weights, name, features, xs, target, size, text)
        expected = weights[name] * factors.flatten().repeat_interleave(size)
        assert torch.allclose(tuned[name], expected)
        assert not torch.allclose(tuned[name], weights[name], rtol=0.1)


def test_masks_that_all_stay_need_no_tuning():
    dense = random_network(4)
    text = calibration(dense)
    same = fisher.kwon(dense, 0, text)
    assert torch.allclose(logits(same, text), logits(dense, text), atol=1e-9)


def test_kwons_tuning_comes_closer_to_the_dense_model(monkeypatch):
    dense = random_network(5)
    text = own_text(dense)
    text.tokens = text.tokens.clone()  # a tensor that gradients may pass by
    tuned = mean_loss(fisher.kwon(dense, 1, text), text)
    monkeypatch.setattr(fisher, "tuned", lambda weights, *_: weights)
    assert tuned < mean_loss(fisher.kwon(dense, 1, text), text)


# ---- swaps

def quadratic(n=8, C=3, seed=0):
    """Return H and G of a random problem whose rows resemble each other."""
    z = randn(40, n, seed=seed) @ randn(n, n, seed=seed + 1)
    return z.T @ z / 40 + 0.1 * torch.eye(n, dtype=z.dtype), z.T @ randn(40, C, seed=seed + 2) / 40


def least(H, G, rows):
    """Return the least value of 1/2 <V, H V> - <V, G> over these rows."""
    rows = sorted(rows)
    return -float((G[rows] * torch.linalg.solve(H[rows][:, rows], G[rows])).sum()) / 2


def rows_of(units, size):
    return [unit * size + k for unit in units for k in range(size)]


@pytest.mark.parametrize("size, inside", [(1, [0, 2, 3, 7]), (2, [1, 3]), (4, [])])
def test_losses_and_gains_are_differences_of_least_values(size, inside):
    H, G = quadratic()
    rows, outside = rows_of(inside, size), [u for u in range(8 // size) if u not in inside]
    now = least(H, G, rows)
    if inside:
        V, factor = swaps.restricted(H, G, torch.tensor(rows))
        expected = [least(H, G, rows_of([u for u in inside if u != unit], size)) - now
                    for unit in inside]
        units = torch.arange(len(rows)).view(-1, size)
        costs = regression.unit_costs(V, torch.cholesky_inverse(factor), units)
        assert (costs / 2).tolist() == pytest.approx(expected)
    expected = [now - least(H, G, rows_of([*inside, unit], size)) for unit in outside]
    found = swaps.gains(H, G, torch.tensor(rows, dtype=torch.long),
                        torch.tensor(rows_of(outside, size)), size)
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("size, keep, at_once", [(1, 4, 1), (1, 4, 3), (2, 2, 1)])
def test_swaps_are_never_worse_than_what_they_start_from(seed, size, keep, at_once):
    H, G = quadratic(seed=10 * seed)
    start = torch.arange(keep)
    stay = swaps.swap_units(H, G, size, start, at_once)
    assert len(stay) == keep == len(set(stay.tolist()))
    assert least(H, G, rows_of(stay.tolist(), size)) <= least(H, G, range(keep * size))


@pytest.mark.parametrize("seed", [6, 11, 12, 16])
def test_swaps_find_the_best_of_all_choices_where_elimination_does_not(seed):
    H, G = quadratic(seed=seed)
    best = min(itertools.combinations(range(8), 4), key=lambda rows: least(H, G, rows))
    V, P = torch.linalg.solve(H, G), torch.linalg.inv(H)
    assert regression.eliminate(V.clone(), P, 4).tolist() != list(best)
    assert swaps.eliminate_and_swap(V, P, 4).tolist() == list(best)


@pytest.mark.parametrize("seed", range(5))
def test_elimination_with_swaps_leaves_the_optimum_of_what_stays(seed):
    H, G = quadratic(seed=seed)
    for size, keep in ((1, 3), (2, 2), (4, 1)):
        V, P = torch.linalg.solve(H, G), torch.linalg.inv(H)
        before = P.clone()
        stay = (swaps.eliminate_and_swap(V, P, keep) if size == 1 else
                swaps.eliminate_units_and_swap(V, P, size, keep)).tolist()
        rows = rows_of(stay, size)
        assert torch.equal(P, before) and len(stay) == keep
        assert torch.allclose(V[rows], torch.linalg.solve(H[rows][:, rows], G[rows]))
        assert not V[[row for row in range(8) if row not in rows]].any()
        if keep == 1:  # a swap sees all others, so one unit is the best one
            assert stay == [min(range(2), key=lambda u: least(H, G, rows_of([u], size)))]


@pytest.mark.parametrize("model_type, heads", [("qwen2", [[0], [1]]), ("qwen3", [[], [0, 1]])])
def test_the_fit_keeps_what_other_eliminators_choose(model_type, heads):
    """Qwen3's heads stay or go by member: there the eliminator chooses the second member."""
    cfg = tiny.config(model_type=model_type)
    members, xs = [tiny.block(cfg, seed) for seed in (0, 1)], tiny.stream(cfg, 8, 20)

    def choose_units(V, P, size, keep):
        return torch.tensor([0, 3] if keep == 2 else [1])
    eliminators = choose_units, lambda V, P, keep: torch.arange(keep) + 7
    fit = refit.Fit(xs.clone(), tiny.runner(cfg, 20), eliminators=eliminators)
    _, kept = tiny.merge(members, xs, fit.runner, fit.attention, fit.mlp)
    assert kept["kv_heads"] == heads
    assert sum(map(len, kept["channels"])) == cfg.intermediate_size


@pytest.mark.parametrize("changes", CHANGES)
def test_the_fit_with_swaps_is_a_fit(changes):
    """A dead member leaves the other as it is, whatever is swapped."""
    cfg = tiny.config(**changes)
    members, run = [tiny.block(cfg, 0), tiny.silent(tiny.block(cfg, 1))], tiny.runner(cfg, 20)
    xs = tiny.stream(cfg, 8, 20)
    expected = through(members, xs, run)
    fit = refit.Fit(xs.clone(), run, 1e-9, eliminators=swaps.SWAPPING)
    _, kept = tiny.merge(members, xs, run, fit.attention, fit.mlp)
    assert kept["kv_heads"][1] == [] and kept["channels"][1] == []
    assert torch.allclose(xs, expected, atol=1e-5)
