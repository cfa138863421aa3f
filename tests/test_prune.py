"""Pruning: which heads and channels stay, and that the dropped channels are folded in as well as they can be."""
import pytest
import tiny
import torch
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
    prune_attention,
    prune_mlp,
    query_heads_of,
    regularized_cholesky,
    ridge_leverage,
)

F, d, n = 12, 7, 5


@pytest.fixture
def psi():
    """Correlated channels of unequal size, (tokens, F)."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(F, F, generator=g, dtype=torch.float64) / F ** 0.5 + 0.5 * torch.eye(F, dtype=torch.float64)
    sizes = torch.linspace(0.2, 3, F, dtype=torch.float64)[torch.randperm(F, generator=g)]
    return torch.randn(400, F, generator=g, dtype=torch.float64) @ mix * sizes


@pytest.fixture
def C(psi):
    return psi.T @ psi / len(psi)


@pytest.fixture
def W():
    return torch.randn(d, F, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


KEEP = torch.tensor([0, 3, 4, 8, 11])
DROP = torch.tensor([1, 2, 5, 6, 7, 9, 10])


def error(W_new, W, psi, keep=KEEP):
    return float((psi[:, keep] @ W_new.T - psi @ W.T).square().sum() / len(psi))


# ---- leverage

def test_leverage_is_the_diagonal_of_its_definition(C):
    for ridge in (1e-3, 1.0, 100.0):
        expected = (C @ torch.linalg.inv(C + ridge * torch.eye(F))).diagonal()
        assert_close(ridge_leverage(C, ridge), expected)


@pytest.mark.parametrize("columns", [1, 5, 12, 100])
def test_the_diagonal_of_an_inverse_is_found_piece_by_piece(C, columns):
    assert_close(inverse_diagonal(torch.linalg.cholesky(C), columns), torch.linalg.inv(C).diagonal())


def test_leverage_lies_in_0_to_1_and_sums_to_the_effective_dimension(C):
    for ridge in (1e-6, 1e-2, 10.0):
        s, eigenvalues = ridge_leverage(C, ridge), torch.linalg.eigvalsh(C)
        assert (s >= 0).all() and (s < 1).all()
        assert_close(s.sum(), (eigenvalues / (eigenvalues + ridge)).sum())


def test_the_printed_formula_would_rank_differently(C):
    """Guard against the misprint: one over the diagonal of C(C + ridge) prefers the weak channels."""
    lam = absolute_ridge(C, 10)
    misprint = 1 / (C @ (C + lam * torch.eye(F))).diagonal()
    strongest = C.diagonal().argmax()
    assert strongest in best(ridge_leverage(C, lam), n) and strongest not in best(misprint, n)


def test_dead_channels_have_no_leverage(psi):
    psi[:, 2] = 0
    s = ridge_leverage(psi.T @ psi / len(psi), 0.5)
    assert s[2] == 0 and (s[torch.arange(F) != 2] > 0).all()


def test_without_any_activity_scores_are_zero_and_weights_stay():
    zero = torch.zeros(F, F, dtype=torch.float64)
    assert (ridge_leverage(zero, absolute_ridge(zero, 10)) == 0).all()
    W = torch.randn(d, F, dtype=torch.float64)
    assert torch.equal(nystrom_down(W, zero, KEEP, 0.0), W[:, KEEP])


def test_the_ridge_is_a_multiple_of_the_mean_eigenvalue(C):
    assert absolute_ridge(C, 10) == pytest.approx(10 * float(torch.linalg.eigvalsh(C).mean()))


def test_rounding_that_makes_the_statistics_indefinite_is_survived():
    v = torch.randn(F, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = v @ v.T - 1e-15 * torch.eye(F)
    factor = regularized_cholesky(C, 0.0)
    assert_close(factor @ factor.T, C, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="positive definite"):
        regularized_cholesky(-torch.eye(F), 0.0)


def test_solves_are_in_float64_whatever_the_statistics_are():
    g = torch.Generator().manual_seed(0)
    C = torch.randn(40, 6, generator=g, dtype=torch.float64)
    C = (C @ C.T).float()  # of rank 6: float32 would not get far with the ridge below
    ridge = 1e-4 * float(C.trace())
    assert regularized_cholesky(C, ridge).dtype == torch.float64
    expected = (C.double() @ torch.linalg.inv(C.double() + ridge * torch.eye(40, dtype=torch.float64))).diagonal()
    assert_close(ridge_leverage(C, ridge), expected, atol=1e-10, rtol=1e-10)


# ---- compensation

def test_keeping_every_channel_is_the_identity(W, C):
    assert torch.equal(nystrom_down(W, C, torch.arange(F), 3.0), W)


def test_compensation_is_the_ridge_least_squares_optimum(W, C, psi):
    """Solved independently: stack sqrt(ridge) (W' - W_K) = 0 below psi_K W' = psi W and call lstsq."""
    for ridge in (1e-4, 1.0, 50.0):
        A = torch.cat([psi[:, KEEP] / len(psi) ** 0.5, ridge ** 0.5 * torch.eye(n)])
        b = torch.cat([psi @ W.T / len(psi) ** 0.5, ridge ** 0.5 * W[:, KEEP].T])
        assert_close(nystrom_down(W, C, KEEP, ridge), torch.linalg.lstsq(A, b).solution.T)


def test_compensation_in_its_other_form(W, C):
    """(C_KK + ridge)^-1 (C_K: W + ridge W_K)."""
    ridge = 2.0
    expected = torch.linalg.solve(C[KEEP][:, KEEP] + ridge * torch.eye(n), C[KEEP] @ W.T + ridge * W[:, KEEP].T).T
    assert_close(nystrom_down(W, C, KEEP, ridge), expected)


def test_a_huge_ridge_is_plain_selection_and_none_gives_the_normal_equations(W, C):
    assert_close(nystrom_down(W, C, KEEP, 1e12), W[:, KEEP])
    assert_close(nystrom_down(W, C, KEEP, 0.0) @ C[KEEP][:, KEEP], W @ C[:, KEEP])


def test_the_smallest_error_is_the_schur_complement(W, C, psi):
    schur = C[DROP][:, DROP] - C[DROP][:, KEEP] @ torch.linalg.solve(C[KEEP][:, KEEP], C[KEEP][:, DROP])
    expected = float((W[:, DROP] @ schur @ W[:, DROP].T).trace())
    assert error(nystrom_down(W, C, KEEP, 0.0), W, psi) == pytest.approx(expected)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1, 1.0, 10.0, 1e3])
def test_compensation_is_never_worse_than_dropping(W, C, psi, ridge):
    assert error(nystrom_down(W, C, KEEP, ridge), W, psi) <= error(W[:, KEEP], W, psi) * (1 + 1e-12)


def test_redundant_channels_are_recovered_exactly(W, psi):
    psi[:, DROP] = psi[:, KEEP] @ torch.randn(n, len(DROP), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    C = psi.T @ psi / len(psi)
    assert error(nystrom_down(W, C, KEEP, 0.0), W, psi) == pytest.approx(0, abs=1e-18 * float(C.trace()) ** 2 + 1e-12)


def test_dropping_one_of_two_equal_channels_adds_their_rows(W, psi):
    psi[:, 1] = psi[:, 0]
    C, keep = psi.T @ psi / len(psi), torch.tensor([0, *range(2, F)])
    expected = W[:, keep].clone()
    expected[:, 0] += W[:, 1]
    assert_close(nystrom_down(W, C, keep, 1e-9), expected, atol=1e-6, rtol=1e-6)


# ---- heads

def test_query_heads_of_kv_heads():
    assert query_heads_of(torch.tensor([1, 2]), 4).tolist() == list(range(4, 12))
    assert query_heads_of(torch.tensor([0, 3]), 1).tolist() == [0, 3]


def test_head_importance_is_size_times_row_norm_summed_over_a_kv_head():
    sizes, o_proj = torch.tensor([1.0, 2, 3, 4]), torch.tensor([[3.0, 0, 1, 0], [4, 1, 0, 2]])
    assert head_importance(sizes, o_proj, 2).tolist() == [1 * 5 + 2 * 1, 3 * 1 + 4 * 2]


def test_best_keeps_order_and_prefers_the_first_of_equals():
    assert best(torch.tensor([1.0, 5, 3, 5, 3]), 3).tolist() == [1, 2, 3]


def test_kept_queries_still_meet_their_keys():
    """Pruned attention equals the wide block with the dropped heads' o_proj columns set to zero."""
    cfg = tiny.config()
    wide, x = flatten_blocks([tiny.block(cfg, 0), tiny.block(cfg, 1)]), tiny.stream(cfg)
    rope = tiny.runner(cfg, x.shape[1]).rope
    for kept in ([0, 1], [0, 3], [1, 2], [2, 3]):
        rows = query_heads_of(query_heads_of(torch.tensor(kept), 3), 8)
        masked = dict(wide)
        masked["self_attn.o_proj.weight"] = torch.zeros_like(wide["self_attn.o_proj.weight"])
        masked["self_attn.o_proj.weight"][:, rows] = wide["self_attn.o_proj.weight"][:, rows]
        pruned = prune_attention(wide, torch.tensor(kept), cfg)
        assert {name: tuple(t.shape) for name, t in pruned.items() if "attn" in name} == {
            name: shape for name, shape in cfg.block_shapes().items() if "attn" in name}
        with torch.no_grad():
            assert_close(Block(pruned, cfg).attend(x, rope), Block(masked, cfg).attend(x, rope))


def test_with_head_norms_all_heads_come_from_the_best_member():
    cfg = tiny.config(model_type="qwen3")
    assert keep_kv_heads(torch.tensor([1.0, 1, 9, 0, 5, 5]), cfg).tolist() == [4, 5]
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
    zero = {name: torch.zeros_like(weights[name]) for name in ("self_attn.o_proj.weight", "mlp.up_proj.weight")}
    return weights | zero


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
    assert kept["channels"][order] == list(range(cfg.intermediate_size)) and kept["channels"][1 - order] == []
    assert {name: tuple(t.shape) for name, t in pruned.items()} == cfg.block_shapes()


def written_out(wide, xs, cfg, ridge):
    """The equations of pruning, computed from its weights without any of its functions (biases on q, k, v)."""
    H, KV, D, n = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.intermediate_size
    g, T = H // KV, xs.shape[1]
    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + cfg.rms_norm_eps).sqrt() * weight
    def rotated(x):
        angle = torch.arange(T)[:, None].double() / cfg.rope_theta ** (torch.arange(0, D, 2).double() / D)
        a, b = x[..., :D // 2], x[..., D // 2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    def project(name):
        y = norm(xs, wide["input_layernorm.weight"]) @ wide[f"self_attn.{name}_proj.weight"].T
        return (y + wide[f"self_attn.{name}_proj.bias"]).unflatten(-1, (-1, D)).transpose(1, 2)
    q, k, v = rotated(project("q")), rotated(project("k")), project("v")
    heads, scores = [], []
    for i in range(q.shape[1]):
        weights = (q[:, i] @ k[:, i // g].transpose(1, 2) / D ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -1e9)
        heads.append(weights.softmax(-1) @ v[:, i // g])
        o = wide["self_attn.o_proj.weight"][:, i * D:(i + 1) * D]
        scores.append(float((heads[i].abs().mean((0, 1)) * o.norm(dim=0)).sum()))
    groups = [sum(scores[j * g:(j + 1) * g]) for j in range(len(scores) // g)]
    kept = sorted(sorted(range(len(groups)), key=lambda j: -groups[j])[:KV])
    x = xs + sum(heads[i] @ wide["self_attn.o_proj.weight"][:, i * D:(i + 1) * D].T
                 for j in kept for i in range(j * g, (j + 1) * g))
    z = norm(x, wide["post_attention_layernorm.weight"])
    gate = z @ wide["mlp.gate_proj.weight"].T
    psi = (gate / (1 + (-gate).exp()) * (z @ wide["mlp.up_proj.weight"].T)).flatten(0, 1)
    C = psi.T @ psi / len(psi)
    lam = ridge * float(C.trace()) / len(C)
    s = (C @ torch.linalg.inv(C + lam * torch.eye(len(C)))).diagonal()
    K = sorted(sorted(range(len(s)), key=lambda i: -float(s[i]))[:n])
    W = wide["mlp.down_proj.weight"]
    down = torch.linalg.solve(C[K][:, K] + lam * torch.eye(n), C[K] @ W.T + lam * W[:, K].T).T
    return groups, kept, lam, K, down, x + (psi[:, K] @ down.T).view_as(x)


@pytest.mark.parametrize("ridge", [0.03, 10.0])
def test_pruning_a_block_follows_its_equations(ridge):
    cfg = tiny.config()
    xs, blocks = tiny.stream(cfg, n=5, length=30), [tiny.block(cfg, i) for i in range(3)]
    blocks[1] = {name: t * 1.5 if "o_proj" in name or "up_proj" in name else t for name, t in blocks[1].items()}
    wide = flatten_blocks(blocks)
    groups, kept, lam, K, down, expected = written_out(wide, xs, cfg, ridge)
    run = tiny.runner(cfg, 30)
    pruned, found = tiny.merge(blocks, xs, run, *paper(run, ridge))
    selected = selection(wide, found, cfg)
    assert found["head_scores"] == pytest.approx(groups, rel=1e-6) and found["ridge"] == pytest.approx(lam)
    assert found["kv_heads"] == by_member(torch.tensor(kept), 2, 3)
    assert found["channels"] == by_member(torch.tensor(K), 40, 3)
    assert sum(map(bool, found["channels"])) > 1  # a choice that one block alone would not explain
    assert_close(pruned["mlp.down_proj.weight"], down, atol=1e-6, rtol=1e-6)
    assert torch.equal(selected["mlp.down_proj.weight"], wide["mlp.down_proj.weight"][:, K])
    assert_close(xs, expected, atol=1e-6, rtol=1e-6)


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
    cfg = tiny.config()
    run, xs = tiny.runner(cfg, 40), tiny.stream(cfg, n=6, length=40)
    wide = flatten_blocks([tiny.block(cfg, i) for i in range(2)])
    got = xs.clone()
    _, kept = tiny.merge([wide], got, run, *paper(run, 1e-6))
    selected = selection(wide, kept, cfg)
    target, plain = xs.clone(), xs.clone()
    run.run_block(prune_mlp(selected, torch.arange(cfg.intermediate_size), selected["mlp.down_proj.weight"]), plain)
    kept_attention = {**wide, **{name: selected[name] for name in selected if "attn" in name}}
    run.run_block(kept_attention, target)
    assert float((got - target).norm()) < float((plain - target).norm())


def test_by_member_and_relative_error():
    assert by_member(torch.tensor([0, 4, 5, 11]), 4, 3) == [[0], [0, 1], [3]]
    start, target = torch.zeros(1, 2, 2), torch.tensor([[[2.0, 0], [0, 4]]])
    assert relative_error(torch.tensor([[[1.0, 0], [0, 4]]]), target, start) == pytest.approx(0.25)


def test_nan_in_statistics_is_an_error():
    cfg = tiny.config()
    wide = flatten_blocks([tiny.block(cfg, i) for i in range(2)])
    wide["mlp.up_proj.weight"][3, 3] = float("nan")
    run = tiny.runner(cfg, 12)
    with pytest.raises(ValueError, match="NaN"):
        tiny.merge([wide], tiny.stream(cfg), run, *paper(run, 10.0))
