"""The equations of the method written out a second time, without its functions.

These tests hold solutions of exercises, so the student's copy (course/handout.py) lacks this file.
"""
import pytest
import tiny
import torch
from tiny import DROP, KEEP, F, error, eye, n
from torch.testing import assert_close

from flatten import flatten_blocks, paper, select_groups, selection
from prune import nystrom_down, regularized_cholesky, ridge_leverage

# ---- grouping

def literal_grouping(S, merges):
    """Follow the paper's rule to the letter: delete column l-1 and row l of the matrix."""
    S, groups = S.clone(), [[i] for i in range(len(S))]
    for _ in range(merges):
        p = int(S.diagonal(1).argmax())
        groups[p:p + 2] = [groups[p] + groups[p + 1]]
        rows, columns = list(range(len(S))), list(range(len(S)))
        del columns[p], rows[p + 1]
        S = S[rows][:, columns]
    return groups


@pytest.mark.parametrize("seed", range(20))
def test_comparing_ends_is_deleting_a_row_and_a_column(seed):
    S = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed))
    for merges in range(1, 9):
        assert select_groups(S, merges, 9) == literal_grouping(S, merges)


# ---- leverage and compensation

def test_leverage_is_the_diagonal_of_its_definition(C):
    for ridge in (1e-3, 1.0, 100.0):
        expected = (C @ torch.linalg.inv(C + ridge * eye(F))).diagonal()
        assert_close(ridge_leverage(C, ridge), expected)


def test_solves_are_in_float64_whatever_the_statistics_are():
    """C has rank 6: in float32 one would not get far with so small a ridge."""
    half = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = (half @ half.T).float()
    ridge = 1e-4 * float(C.trace())
    assert regularized_cholesky(C, ridge).dtype == torch.float64
    expected = (C.double() @ torch.linalg.inv(C.double() + ridge * eye(40))).diagonal()
    assert_close(ridge_leverage(C, ridge), expected, atol=1e-10, rtol=1e-10)


def test_compensation_in_its_other_form(W, C):
    """(C_KK + ridge)^-1 (C_K: W + ridge W_K)."""
    ridge, C_KK = 2.0, C[KEEP][:, KEEP]
    expected = torch.linalg.solve(C_KK + ridge * eye(n), C[KEEP] @ W.T + ridge * W[:, KEEP].T).T
    assert_close(nystrom_down(W, C, KEEP, ridge), expected)


def test_the_smallest_error_is_the_schur_complement(W, C, psi):
    explained = C[DROP][:, KEEP] @ torch.linalg.solve(C[KEEP][:, KEEP], C[KEEP][:, DROP])
    schur = C[DROP][:, DROP] - explained
    expected = float((W[:, DROP] @ schur @ W[:, DROP].T).trace())
    assert error(nystrom_down(W, C, KEEP, 0.0), W, psi) == pytest.approx(expected)


# ---- the whole block

def norm(x, weight, cfg):
    return x / (x.square().mean(-1, keepdim=True) + cfg.rms_norm_eps).sqrt() * weight


def top(scores, count):
    """Return the indices of the largest scores, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:count])


def split(kept, size, width):
    """Return indices of a wide block as indices within each of its members."""
    return [[i - member * size for i in kept if i // size == member] for member in range(width)]


def attention_written_out(wide, xs, cfg):
    """Compute the equations of attention and of head pruning without our functions.

    Returns the scores of the KV heads, which of them stay, and the stream after the pruned
    attention. Queries, keys and values have biases.
    """
    D, T, o_proj = cfg.head_dim, xs.shape[1], wide["self_attn.o_proj.weight"]
    g = cfg.num_attention_heads // cfg.num_key_value_heads
    frequency = cfg.rope_theta ** -(torch.arange(0, D, 2).double() / D)
    angle = torch.arange(T)[:, None].double() * frequency                       # (T, D/2)
    future = torch.ones(T, T).triu(1).bool()

    def project(name):
        y = norm(xs, wide["input_layernorm.weight"], cfg) @ wide[f"self_attn.{name}_proj.weight"].T
        return (y + wide[f"self_attn.{name}_proj.bias"]).unflatten(-1, (-1, D)).transpose(1, 2)

    def rotated(x):
        a, b = x[..., :D // 2], x[..., D // 2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    q, k, v = rotated(project("q")), rotated(project("k")), project("v")        # (N, heads, T, D)
    added, scores = [], []
    for i in range(q.shape[1]):
        logits = q[:, i] @ k[:, i // g].transpose(1, 2) / D ** 0.5
        head = logits.masked_fill(future, -1e9).softmax(-1) @ v[:, i // g]      # (N, T, D)
        reads = o_proj[:, i * D:(i + 1) * D]
        added.append(head @ reads.T)
        scores.append(float((head.abs().mean((0, 1)) * reads.norm(dim=0)).sum()))
    groups = [sum(scores[i:i + g]) for i in range(0, len(scores), g)]
    kept = top(groups, cfg.num_key_value_heads)
    return groups, kept, xs + sum(added[i] for i in range(len(added)) if i // g in kept)


def mlp_written_out(wide, x, cfg, ridge):
    """Compute the equations of the MLP and of channel pruning without our functions.

    Returns the absolute ridge, which channels stay, their down_proj, and the stream at the end.
    """
    n, W = cfg.intermediate_size, wide["mlp.down_proj.weight"]
    z = norm(x, wide["post_attention_layernorm.weight"], cfg)
    gate, up = z @ wide["mlp.gate_proj.weight"].T, z @ wide["mlp.up_proj.weight"].T
    psi = (gate / (1 + (-gate).exp()) * up).flatten(0, 1)
    C = psi.T @ psi / len(psi)
    lam = ridge * float(C.trace()) / len(C)
    K = top((C @ torch.linalg.inv(C + lam * eye(len(C)))).diagonal(), n)
    down = torch.linalg.solve(C[K][:, K] + lam * eye(n), C[K] @ W.T + lam * W[:, K].T).T
    return lam, K, down, x + (psi[:, K] @ down.T).view_as(x)


@pytest.mark.parametrize("ridge", [0.03, 10.0])
def test_pruning_a_block_follows_its_equations(ridge):
    cfg = tiny.config()
    xs, blocks = tiny.stream(cfg, n=5, length=30), [tiny.block(cfg, i) for i in range(3)]
    for name in ("self_attn.o_proj.weight", "mlp.up_proj.weight"):
        blocks[1][name] *= 1.5
    wide, run = flatten_blocks(blocks), tiny.runner(cfg, 30)
    scores, heads, middle = attention_written_out(wide, xs, cfg)
    lam, K, down, expected = mlp_written_out(wide, middle, cfg, ridge)
    pruned, kept = tiny.merge(blocks, xs, run, *paper(run, ridge))
    assert kept["head_scores"] == pytest.approx(scores, rel=1e-6)
    assert kept["ridge"] == pytest.approx(lam)
    assert kept["kv_heads"] == split(heads, 2, 3) and kept["channels"] == split(K, 40, 3)
    assert sum(map(bool, kept["channels"])) > 1  # a choice that one block alone would not explain
    assert_close(pruned["mlp.down_proj.weight"], down, atol=1e-6, rtol=1e-6)
    assert_close(xs, expected, atol=1e-6, rtol=1e-6)
    selected = selection(wide, kept, cfg)
    assert torch.equal(selected["mlp.down_proj.weight"], wide["mlp.down_proj.weight"][:, K])
