"""Pruning: which heads and channels stay, and how well the dropped channels are folded in."""
import pytest
import tiny
import torch
from tiny import DROP, KEEP, F, error, eye, n
from torch.testing import assert_close

from evaluate import relative_error
from flatten import flatten_blocks, paper, selection
from model import Block
from prune import (
    absolute_ridge,
    best,
    by_member,
    head_importance,
    inverse_diagonal,
    keep_kv_heads,
    nystrom_down,
    of_block,
    prune_attention,
    prune_channels,
    prune_mlp,
    query_heads_of,
    regularized_cholesky,
    ridge_leverage,
)

# ---- leverage

@pytest.mark.parametrize("columns", [1, 5, 12, 100])
def test_the_diagonal_of_an_inverse_is_found_piece_by_piece(C, columns):
    expected = torch.linalg.inv(C).diagonal()
    assert_close(inverse_diagonal(torch.linalg.cholesky(C), columns), expected)


def test_leverage_lies_in_0_to_1_and_sums_to_the_effective_dimension(C):
    for ridge in (1e-6, 1e-2, 10.0):
        s, eigenvalues = ridge_leverage(C, ridge), torch.linalg.eigvalsh(C)
        assert (s >= 0).all() and (s < 1).all(), \
            f"leverages\nexpected: all in [0, 1)\ncame:     {tiny.shown(s)}"
        tiny.expect(f"the sum of the leverages at ridge {ridge:g}, for eigenvalues "
                    f"{tiny.shown(eigenvalues)}", (eigenvalues / (eigenvalues + ridge)).sum(),
                    s.sum())


def test_leverage_of_two_channels_in_numbers():
    for C, ridge, expected in (([[1.0, 0], [0, 3]], 1.0, [1 / 2, 3 / 4]),
                               ([[2.0, 1], [1, 2]], 1.0, [5 / 8, 5 / 8]),
                               ([[4.0, 0], [0, 0]], 4.0, [1 / 2, 0])):
        came = ridge_leverage(torch.tensor(C, dtype=torch.float64), ridge)
        tiny.expect(f"leverages for C = {C}, ridge {ridge:g}",
                    torch.tensor(expected, dtype=torch.float64), came)


def test_leverage_is_the_weight_of_a_channel_in_its_own_regression(C, psi):
    """Ask all channels, each at its price, to imitate channel i: how much is i itself used?"""
    for ridge in (1e-3, 1.0, 100.0):
        rows = torch.cat([psi / len(psi) ** 0.5, ridge ** 0.5 * eye(F)])
        targets = torch.cat([psi / len(psi) ** 0.5, torch.zeros_like(C)])
        own = torch.linalg.lstsq(rows, targets).solution.diagonal()
        tiny.expect(f"leverages of 12 channels at ridge {ridge:g}", own, ridge_leverage(C, ridge))


def test_the_printed_formula_would_rank_differently(C):
    """As printed, one over the diagonal of C(C + ridge), it prefers the weak channels."""
    lam = absolute_ridge(C, 10)
    misprint = 1 / (C @ (C + lam * eye(F))).diagonal()
    strongest = C.diagonal().argmax()
    assert strongest in best(ridge_leverage(C, lam), n) and strongest not in best(misprint, n)


def test_dead_channels_have_no_leverage(psi):
    psi[:, 2] = 0
    s = ridge_leverage(psi.T @ psi / len(psi), 0.5)
    assert s[2] == 0 and (s[torch.arange(F) != 2] > 0).all()


def test_without_any_activity_scores_are_zero_and_weights_stay(W):
    zero = torch.zeros(F, F, dtype=torch.float64)
    assert (ridge_leverage(zero, absolute_ridge(zero, 10)) == 0).all()
    assert torch.equal(nystrom_down(W, zero, KEEP, 0.0), W[:, KEEP])


def test_the_ridge_is_a_multiple_of_the_mean_eigenvalue(C):
    assert absolute_ridge(C, 10) == pytest.approx(10 * float(torch.linalg.eigvalsh(C).mean()))


def test_rounding_that_makes_the_statistics_indefinite_is_survived():
    v = torch.randn(F, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = v @ v.T - 1e-15 * eye(F)
    factor = regularized_cholesky(C, 0.0)
    assert_close(factor @ factor.T, C, atol=1e-5, rtol=0)


def test_statistics_that_are_indefinite_beyond_rounding_are_refused():
    with pytest.raises(ValueError, match="positive definite"):
        regularized_cholesky(-eye(F), 0.0)


# ---- compensation

def test_keeping_every_channel_is_the_identity(W, C):
    tiny.expect("down_proj if all channels stay", W, nystrom_down(W, C, torch.arange(F), 3.0),
                atol=0, rtol=0)


def test_compensation_is_the_ridge_least_squares_optimum(W, C, psi):
    """Least squares solves psi_K W' = psi W with rows sqrt(ridge) (W' - W_K) = 0 below."""
    for ridge in (1e-4, 1.0, 50.0):
        A = torch.cat([psi[:, KEEP] / len(psi) ** 0.5, ridge ** 0.5 * eye(n)])
        b = torch.cat([psi @ W.T / len(psi) ** 0.5, ridge ** 0.5 * W[:, KEEP].T])
        tiny.expect(f"down_proj (7, 5) of least objective, at ridge {ridge:g}",
                    torch.linalg.lstsq(A, b).solution.T, nystrom_down(W, C, KEEP, ridge))


def test_a_huge_ridge_is_plain_selection_and_none_gives_the_normal_equations(W, C):
    assert_close(nystrom_down(W, C, KEEP, 1e12), W[:, KEEP])
    assert_close(nystrom_down(W, C, KEEP, 0.0) @ C[KEEP][:, KEEP], W @ C[:, KEEP])


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1, 1.0, 10.0, 1e3])
def test_compensation_is_never_worse_than_dropping(W, C, psi, ridge):
    assert error(nystrom_down(W, C, KEEP, ridge), W, psi) <= error(W[:, KEEP], W, psi) * (1 + 1e-12)


def test_redundant_channels_are_recovered_exactly(W, psi):
    g = torch.Generator().manual_seed(3)
    psi[:, DROP] = psi[:, KEEP] @ torch.randn(n, len(DROP), generator=g, dtype=torch.float64)
    C = psi.T @ psi / len(psi)
    assert error(nystrom_down(W, C, KEEP, 0.0), W, psi) < 1e-18 * float(C.trace()) ** 2 + 1e-12


def test_dropping_one_of_two_equal_channels_adds_their_rows(W, psi):
    """First two channels alone, with numbers: columns 10 and 1 become one of 11."""
    small = nystrom_down(torch.tensor([[10.0, 1]]), torch.tensor([[2.0, 2], [2, 2]]),
                         torch.tensor([0]), 1e-9)
    tiny.expect("W = [[10, 1]], two equal channels, the first stays",
                torch.tensor([[11.0]], dtype=torch.float64), small, atol=1e-6, rtol=1e-6)
    psi[:, 1] = psi[:, 0]
    C, keep = psi.T @ psi / len(psi), torch.tensor([0, *range(2, F)])
    expected = W[:, keep].clone()
    expected[:, 0] += W[:, 1]
    tiny.expect("of 12 channels the first two are equal, and the second goes", expected,
                nystrom_down(W, C, keep, 1e-9), atol=1e-6, rtol=1e-6)


# ---- heads

def test_query_heads_of_kv_heads():
    for kv_heads, n_rep, expected in (([0, 3], 1, [0, 3]), ([1], 2, [2, 3]),
                                      ([1, 2], 4, [4, 5, 6, 7, 8, 9, 10, 11])):
        tiny.expect(f"query heads of the KV heads {kv_heads}, {n_rep} for each",
                    torch.tensor(expected), query_heads_of(torch.tensor(kv_heads), n_rep))


def test_head_importance_is_size_times_row_norm_summed_over_a_kv_head():
    sizes, o_proj = torch.tensor([1.0, 2, 3, 4]), torch.tensor([[3.0, 0, 1, 0], [4, 1, 0, 2]])
    tiny.expect(f"scores of 2 KV heads, sizes {sizes.tolist()}, o_proj {o_proj.tolist()}",
                torch.tensor([7.0, 11]), head_importance(sizes, o_proj, 2))
    tiny.expect(f"scores of 4 KV heads, sizes {sizes.tolist()}, o_proj {o_proj.tolist()}",
                torch.tensor([5.0, 2, 3, 8]), head_importance(sizes, o_proj, 4))


def test_best_keeps_order_and_prefers_the_first_of_equals():
    assert best(torch.tensor([1.0, 5, 3, 5, 3]), 3).tolist() == [1, 2, 3]


def test_kept_queries_still_meet_their_keys():
    """Pruned attention equals the wide block with the dropped heads' o_proj columns set to zero."""
    cfg = tiny.config()
    wide, x = flatten_blocks([tiny.block(cfg, 0), tiny.block(cfg, 1)]), tiny.stream(cfg)
    rope, o_proj = tiny.runner(cfg, x.shape[1]).rope, wide["self_attn.o_proj.weight"]
    for kept in ([0, 1], [0, 3], [1, 2], [2, 3]):
        masked = torch.zeros_like(o_proj)
        for j in kept:  # each KV head serves 3 query heads of 8 channels
            masked[:, 24 * j:24 * (j + 1)] = o_proj[:, 24 * j:24 * (j + 1)]
        pruned = prune_attention(wide, torch.tensor(kept), cfg)
        with torch.no_grad():
            expected = Block(wide | {"self_attn.o_proj.weight": masked}, cfg).attend(x, rope)
            tiny.expect(f"what attention adds if the KV heads {kept} of 4 stay", expected,
                        Block(pruned, cfg).attend(x, rope))


def test_pruned_attention_has_the_shapes_of_an_ordinary_block():
    cfg = tiny.config()
    wide = flatten_blocks([tiny.block(cfg, 0), tiny.block(cfg, 1)])
    pruned = prune_attention(wide, torch.tensor([0, 3]), cfg)
    shapes = {name: shape for name, shape in cfg.block_shapes().items() if "attn" in name}
    assert {name: tuple(pruned[name].shape) for name in shapes} == shapes


def test_with_head_norms_all_heads_come_from_the_best_member():
    """Members have two KV heads each. The best head is the second's, the best sum the third's."""
    cfg = tiny.config(model_type="qwen3")
    assert keep_kv_heads(torch.tensor([1.0, 1, 9, 0, 5, 5]), cfg).tolist() == [4, 5]


def test_with_head_norms_the_heads_of_one_member_work_as_in_that_member():
    cfg = tiny.config(model_type="qwen3")
    members, x = [tiny.block(cfg, i) for i in range(3)], tiny.stream(cfg)
    pruned = prune_attention(flatten_blocks(members), torch.tensor([4, 5]), cfg)
    rope = tiny.runner(cfg, x.shape[1]).rope
    with torch.no_grad():
        assert_close(Block(pruned, cfg).attend(x, rope), Block(members[2], cfg).attend(x, rope))


def test_pruning_channels_keeps_gate_up_and_down_in_step():
    cfg = tiny.config()
    block, keep = tiny.block(cfg, 0), torch.tensor([3, 7, 20])
    down = torch.randn(cfg.hidden_size, 3, dtype=torch.float64)
    pruned, x = prune_mlp(block, keep, down), tiny.stream(cfg)
    with torch.no_grad():
        wide = Block(block, cfg)
        expected = wide.mlp.channels(wide.post_attention_layernorm(x))[..., keep] @ down.T
        assert_close(Block(pruned, cfg).feed(x), expected)


# ---- the whole block

def dead(weights):
    """A block whose heads write nothing and whose channels never fire."""
    return weights | {name: torch.zeros_like(weights[name])
                      for name in ("self_attn.o_proj.weight", "mlp.up_proj.weight")}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("order", [0, 1])
def test_a_dead_block_merged_with_any_other_leaves_the_other(order, family):
    cfg, xs = tiny.config(model_type=family), tiny.stream(tiny.config())
    run, live = tiny.runner(cfg, xs.shape[1]), tiny.block(cfg, 0)
    blocks = [live, dead(tiny.block(cfg, 1))][::1 - 2 * order]
    expected, got = xs.clone(), xs.clone()
    run.run_block(live, expected)
    pruned, kept = tiny.merge(blocks, got, run, *paper(run, ridge=10.0))
    assert_close(got, expected)
    assert kept["channels"][order] == list(range(cfg.intermediate_size))
    assert kept["channels"][1 - order] == []
    assert {name: tuple(t.shape) for name, t in pruned.items()} == cfg.block_shapes()


@pytest.mark.parametrize("members", [2, 3])
def test_pruning_leaves_the_stream_that_the_pruned_block_makes(members):
    cfg = tiny.config()
    run, xs = tiny.runner(cfg, 12), tiny.stream(cfg)
    got, expected = xs.clone(), xs.clone()
    blocks = [tiny.block(cfg, i) for i in range(members)]
    pruned, kept = tiny.merge(blocks, got, run, *paper(run, 10.0))
    selected = selection(flatten_blocks(blocks), kept, cfg)
    run.run_block(pruned, expected)
    assert torch.equal(got, expected)
    assert all(torch.equal(pruned[name], selected[name]) for name in pruned if "down" not in name)
    assert sum(map(len, kept["channels"])) == cfg.intermediate_size
    assert sum(map(len, kept["kv_heads"])) == cfg.num_key_value_heads


def test_a_small_ridge_repairs_the_mlp_on_its_calibration_text():
    """Compensation comes closer than plain selection to the MLP that lost no channel."""
    cfg = tiny.config()
    run, xs = tiny.runner(cfg, 40), tiny.stream(cfg, n=6, length=40)
    wide = flatten_blocks([tiny.block(cfg, i) for i in range(2)])
    compensated, plain, target = xs.clone(), xs.clone(), xs.clone()
    _, kept = tiny.merge([wide], compensated, run, *paper(run, 1e-6))
    selected = selection(wide, kept, cfg)
    run.run_block(selected, plain)
    run.run_block(wide | {name: selected[name] for name in selected if "attn" in name}, target)
    assert float((compensated - target).norm()) < float((plain - target).norm())


def test_kept_indices_are_split_by_member():
    assert by_member(torch.tensor([0, 4, 5, 11]), 4, 3) == [[0], [0, 1], [3]]


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("keep", [5, 7])
def test_any_number_of_channels_may_stay_and_is_reported_by_member(members, keep):
    cfg = tiny.config()
    run, xs = tiny.runner(cfg, 12), tiny.stream(cfg)
    wide = flatten_blocks([tiny.block(cfg, i) for i in range(members)])
    pruned, kept = prune_channels(wide, xs, run, 10.0, compensate=False, keep=keep)
    channels = of_block(kept["channels"], cfg.intermediate_size)
    assert len(kept["channels"]) == members and len(channels) == keep
    assert torch.equal(pruned["mlp.down_proj.weight"], wide["mlp.down_proj.weight"][:, channels])


def test_relative_error_is_the_mean_over_tokens_of_what_is_missing():
    start, target = torch.zeros(1, 2, 2), torch.tensor([[[2.0, 0], [0, 4]]])
    output = torch.tensor([[[1.0, 0], [0, 4]]])  # half of the first token's change is missing
    assert relative_error(output, target, start) == pytest.approx(0.25)


def test_nan_in_statistics_is_an_error():
    cfg = tiny.config()
    wide = flatten_blocks([tiny.block(cfg, i) for i in range(2)])
    wide["mlp.up_proj.weight"][3, 3] = float("nan")
    run = tiny.runner(cfg, 12)
    with pytest.raises(ValueError, match="NaN"):
        tiny.merge([wide], tiny.stream(cfg), run, *paper(run, 10.0))
