"""Fitting merged blocks to the dense model, and grouping by measured damage.

Each step is held against its definition.
"""
import itertools
import json

import pytest
import tiny
import torch
import torch.nn.functional as F

from beyond import grouping, refit, regression
from checkpoint.reader import Checkpoint
from compare.network import Network
from evaluate import relative_error, through
from flatten import READS, flatten_blocks, paper
from model import load
from prune import nystrom_down, regularized_cholesky

g = torch.Generator()


def refitted(members, xs, dense, run, **options):
    """Merge these blocks into one, fitted; both streams pass through them."""
    fit = refit.Fit(dense, run, **options)
    return tiny.merge(members, xs, run, fit.attention, fit.mlp)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=g.manual_seed(seed), dtype=torch.float64)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def test_alignment_is_the_identity_for_equal_inputs_and_exact_for_linear_images():
    n, M = randn(200, 6), randn(6, 6, seed=1)
    G = n.T @ n / 200
    assert torch.allclose(regression.alignment(G, *regression.ridged(G, 0.1)), eye(6))
    assert torch.allclose(regression.alignment(G @ M, *regression.ridged(G, 1e-12)), M, atol=1e-8)


def test_the_ridge_grows_with_the_unknowns_for_each_token():
    xs = torch.zeros(8, 50, 3)
    assert regression.ridge_of(40, xs, 3.0) == pytest.approx(3.0 * 40 / 400)


def test_alignment_is_the_ridge_optimum():
    """The same optimum by least squares, with the ridge as more rows."""
    n, t = randn(50, 6), randn(50, 6, seed=1)
    G, a = n.T @ n / 50, 0.3
    scale = (a * float(G.diagonal().mean())) ** 0.5
    rows = torch.cat([n / 50 ** 0.5, scale * eye(6)])
    targets = torch.cat([t / 50 ** 0.5, scale * eye(6)])
    M = regression.alignment(n.T @ t / 50, *regression.ridged(G, a))
    assert torch.allclose(M, torch.linalg.lstsq(rows, targets).solution)


@pytest.mark.parametrize("norm", READS)
def test_projections_read_through_a_map_what_they_would_read_after_it(norm):
    cfg = tiny.config()
    block, M, n = tiny.block(cfg, 0), randn(32, 32), randn(7, 32, seed=1)
    mapped = refit.read_through(block, READS[norm], M)
    for name in READS[norm]:
        assert torch.allclose(F.linear(n, mapped[name]), F.linear(n @ M, block[name]))
    assert all(mapped[name] is block[name] for name in block if name not in READS[norm])


def problem(n=8, d=3, tokens=40, seed=0):
    """Return data z, a target t and start weights W, then A = z^T z and B = z^T t, a token."""
    z = randn(tokens, n, seed=seed) @ randn(n, n, seed=seed + 1)
    t, W = randn(tokens, d, seed=seed + 2), randn(n, d, seed=seed + 3)
    return z, t, W, z.T @ z / tokens, z.T @ t / tokens


def fit(W, A, B, ridge):
    return regression.fit(W, B, regularized_cholesky(A, ridge), ridge)


def inverse(A, ridge):
    return torch.linalg.inv(A + ridge * eye(len(A)))


def objective(V, rows, z, t, W, ridge):
    """Return what a fit with these rows minimises: error per token, and distance from W."""
    error = (z[:, rows] @ V - t).square().sum() / len(z)
    return float(error + ridge * (V - W[rows]).square().sum())


def test_fit_is_the_ridge_optimum():
    z, t, W, A, B = problem()
    ridge = 0.2
    rows = torch.cat([z / 40 ** 0.5, ridge ** 0.5 * eye(8)])
    targets = torch.cat([t / 40 ** 0.5, ridge ** 0.5 * W])
    assert torch.allclose(fit(W, A, B, ridge), torch.linalg.lstsq(rows, targets).solution)


def test_a_target_that_the_weights_meet_already_changes_nothing():
    _, _, W, A, _ = problem()
    assert torch.allclose(fit(W, A, A @ W, 0.2), W)


def test_the_costs_of_two_rows_in_numbers():
    """A + ridge I is [[2, 1], [1, 2]]. If both rows go, all that V gained is lost."""
    V, P = (torch.tensor(rows).double() for rows in ([[1], [2]], [[2, -1], [-1, 2]]))
    for units, expected in (([[0], [1]], [1.5, 6.0]), ([[0, 1]], [14.0])):
        tiny.expect(f"V = [[1], [2]], P = [[2, -1], [-1, 2]] / 3; costs of the units {units}",
                    torch.tensor(expected).double(),
                    regression.unit_costs(V, P / 3, torch.tensor(units)))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_cost_is_by_how_much_the_objective_grows(size):
    z, t, W, A, B = problem()
    ridge, units = 0.1, torch.arange(8).view(-1, size)
    V, P, rows = fit(W, A, B, ridge), inverse(A, ridge), torch.arange(8)

    def grown(unit):
        """The rows that are gone count as zeros, all others are fitted again."""
        left = rows[~torch.isin(rows, unit)]
        least = objective(fit(W[left], A[left][:, left], B[left], ridge), left, z, t, W, ridge)
        return least + ridge * float(W[unit].square().sum()) - objective(V, rows, z, t, W, ridge)
    before = V.clone(), P.clone()
    tiny.expect(f"costs of units of {size} rows", torch.tensor(list(map(grown, units))).double(),
                regression.unit_costs(V, P, units), rtol=1e-5, atol=1e-8)
    assert torch.equal(V, before[0]) and torch.equal(P, before[1]), "V and P are to stay"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size, keep", [(1, 3), (2, 2), (4, 1)])
def test_elimination_is_greedy_by_brute_force_and_leaves_the_optimum(seed, size, keep):
    z, t, W, A, B = problem(seed=10 * seed)
    ridge, units = 0.1, list(range(8 // size))

    def rows_of(chosen):
        return torch.tensor([unit * size + k for unit in chosen for k in range(size)])

    def best_without(unit):
        """The least objective without this unit; the rows that are gone count as zeros."""
        rows = rows_of([other for other in units if other != unit])
        V = fit(W[rows], A[rows][:, rows], B[rows], ridge)
        gone = [row for row in range(8) if row not in rows.tolist()]
        return objective(V, rows, z, t, W, ridge) + ridge * float(W[gone].square().sum())
    while len(units) > keep:
        units.remove(min(units, key=best_without))
    V, P = fit(W, A, B, ridge), inverse(A, ridge)
    kept = regression.eliminate_units(V, P, size, keep)
    rows = rows_of(units)
    tiny.expect(f"{keep} units of {size} rows remain", torch.tensor(units), kept)
    tiny.expect("V in the rows that remain, which are to be the best without the others",
                fit(W[rows], A[rows][:, rows], B[rows], ridge), V[rows])
    if size == 1:
        for steps in (100, 8):  # one row a batch
            V, P = fit(W, A, B, ridge), inverse(A, ridge)
            assert regression.eliminate(V, P, keep, steps).tolist() == units
            assert torch.allclose(V[rows], fit(W[rows], A[rows][:, rows], B[rows], ridge))


def test_elimination_changes_nothing_if_all_may_stay():
    V, P = randn(8, 3), eye(8)
    assert regression.eliminate_units(V, P, 2, 4).tolist() == [0, 1, 2, 3]
    assert torch.equal(V, randn(8, 3)) and torch.equal(P, eye(8))


def test_batches_of_elimination_see_duplicates():
    """Every channel is there twice, and one of each pair may go for nothing: but not both."""
    z, _, W, _, _ = problem(n=20, tokens=100)
    z[:, 10:] = z[:, :10]
    A, t = z.T @ z / 100, z @ W
    for steps in (1, 2, 5):
        V, P = fit(W, A, z.T @ t / 100, 1e-6), inverse(A, 1e-6)
        kept = regression.eliminate(V, P, 10, steps)
        assert sorted(i % 10 for i in kept.tolist()) == list(range(10))
        assert torch.allclose(z[:, kept] @ V[kept], t, atol=1e-2)


def test_the_cheapest_rows_are_those_that_go_one_after_the_other():
    _, _, W, A, B = problem(n=9)
    V, P = fit(W, A, B, 0.1), inverse(A, 0.1)
    before = V.clone(), P.clone()
    rows = regression.cheapest(V, P, 6).tolist()
    assert torch.equal(V, before[0]) and torch.equal(P, before[1])
    for count in range(7):
        left = regression.eliminate_units(V.clone(), P.clone(), 1, 9 - count).tolist()
        assert left == sorted(set(range(9)) - set(rows[:count]))


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_elimination_in_batches_leaves_the_optimum_of_what_remains(steps):
    _, _, W, A, B = problem(n=60, tokens=200)
    kept = regression.eliminate(V := fit(W, A, B, 0.1), inverse(A, 0.1), 20, steps)
    assert len(kept) == 20
    assert torch.allclose(V[kept], fit(W[kept], A[kept][:, kept], B[kept], 0.1))


def test_elimination_leaves_the_inverse_hessian_alone():
    _, _, W, A, B = problem()
    P = inverse(A, 0.1)
    before = P.clone()
    regression.eliminate(fit(W, A, B, 0.1), P, 3)
    assert torch.equal(P, before)


def test_removing_leaves_the_inverse_of_what_remains():
    _, _, _, A, _ = problem()
    V, P, rows = randn(8, 3), inverse(A, 0.1), torch.tensor([1, 4])
    regression.remove(V, P, rows)
    left = [0, 2, 3, 5, 6, 7]
    assert torch.allclose(P[left][:, left], inverse(A[left][:, left], 0.1))
    assert not P[rows].any() and not V[rows].any()


def test_no_weights_fit_the_dense_stream_better_than_the_fit():
    """Neither the paper's compensation nor plain selection does, with the same channels."""
    z, t, W, A, B = problem()
    rows = torch.tensor([0, 3, 4, 6])
    V, nystrom = fit(W[rows], A[rows][:, rows], B[rows], 0.1), nystrom_down(W.T, A, rows, 0.1).T
    least = objective(V, rows, z, t, W, 0.1)
    assert all(least <= objective(other, rows, z, t, W, 0.1) for other in (nystrom, W[rows]))


CHANGES = [{}, {"model_type": "llama", "num_key_value_heads": 6}, {"model_type": "qwen3"}]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_block_alone_stays_what_it_is(changes):
    cfg = tiny.config(**changes)
    member, xs = tiny.block(cfg, 0), tiny.stream(cfg, 6, 20)
    dense, run = xs.clone(), tiny.runner(cfg, 20)
    expected = through([member], xs, run)
    refitted([member], xs, dense, run)
    assert torch.allclose(dense, expected) and torch.allclose(xs, expected, atol=1e-9)


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("changes", CHANGES)
def test_a_dead_block_merged_with_any_other_leaves_the_other(changes, dead):
    cfg = tiny.config(**changes)
    members = [tiny.block(cfg, 0), tiny.block(cfg, 1)]
    members[dead] = tiny.silent(members[dead])
    xs, run = tiny.stream(cfg, 8, 20), tiny.runner(cfg, 20)
    dense, expected = xs.clone(), through(members, xs, run)
    weights, kept = refitted(members, xs, dense, run, ridge=1e-9)
    assert torch.allclose(xs, expected, atol=1e-5) and torch.allclose(dense, expected)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == cfg.block_shapes()
    assert kept["kv_heads"][dead] == [] and kept["channels"][dead] == []


@pytest.mark.parametrize("changes", CHANGES)
def test_the_refit_is_closer_to_the_dense_stream_than_the_paper_and_every_step_helps(changes):
    cfg = tiny.config(**changes)
    members = [tiny.block(cfg, seed) for seed in (0, 1)]
    for member in members:
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            member[name] *= 0.5
    start, run = tiny.stream(cfg, 32, 25), tiny.runner(cfg, 25)
    target = through(members, start, run)

    def error(parts):
        xs = start.clone()
        refitted(members, xs, start.clone(), run, parts=parts)
        return relative_error(xs, target, start)
    pruned = start.clone()
    tiny.merge(members, pruned, run, *paper(run, 10.0))
    full = error(refit.PARTS)
    assert full < relative_error(pruned, target, start)
    for part in refit.PARTS:
        assert full < error(tuple(set(refit.PARTS) - {part})), part


def test_conjugate_gradients_reach_the_minimum_and_come_closer_with_every_step():
    H, slope = problem(n=6)[3], randn(6, 4)
    best = torch.linalg.solve(H, slope)

    def distance(steps, precondition=lambda left: left):
        D = regression.conjugate_gradients(slope, lambda D: H @ D, precondition, steps)
        return float(((D - best) * (H @ (D - best))).sum())
    distances = [distance(steps) for steps in range(7)]
    assert all(after < before for before, after in itertools.pairwise(distances))
    assert distance(24) < 1e-12 * distances[0]
    assert distance(1, lambda left: torch.linalg.solve(H, left)) < 1e-12 * distances[0]


def test_conjugate_gradients_stay_where_there_is_no_slope():
    flat = torch.zeros(6, 4, dtype=torch.float64)
    D = regression.conjugate_gradients(flat, lambda D: D, lambda left: left, 3)
    assert not D.any()


@pytest.mark.parametrize("changes", CHANGES)
def test_mixing_is_what_the_block_does_to_its_values_and_unmixing_its_adjoint(changes):
    cfg = tiny.config(**changes)
    run, n = tiny.runner(cfg, 20), tiny.stream(cfg, 3, 20)
    block = run.block(tiny.block(cfg, 0))
    attention, mlp = block.self_attn, block.mlp
    for mixing, proj, output in (
            (refit.mix_heads(attention, n, run.rope), attention.v_proj, attention(n, run.rope)),
            (refit.mix_channels(mlp, n), mlp.up_proj, mlp(n))):
        mix, unmix, _ = mixing
        assert torch.allclose(mix(proj(n)), output)
        v, r = randn(*proj(n).shape, seed=1), randn(*n.shape, seed=2)
        assert torch.allclose((mix(v) * r).sum(), (v * unmix(r)).sum())


@torch.no_grad()
@pytest.mark.parametrize("changes", CHANGES)
def test_own_curvature_is_what_errors_in_one_units_values_cost_if_tokens_are_independent(changes):
    """Every value of every token is set to one by itself, and what it adds is seen."""
    cfg, T, ridge = tiny.config(**changes), 7, 0.1
    run, n = tiny.runner(cfg, T), tiny.stream(cfg, 1, T)
    block = run.block(tiny.block(cfg, 0))
    attention, mlp, KV = block.self_attn, block.mlp, cfg.num_key_value_heads
    for (mix, _, overlaps), writes, units, width in (
            (refit.mix_heads(attention, n, run.rope), attention.o_proj, KV, cfg.head_dim),
            (refit.mix_channels(mlp, n), mlp.down_proj, cfg.intermediate_size, 1)):
        heads = writes.in_features // (units * width)
        one_each = eye(T * units * width).view(-1, 1, T, units * width)
        added = torch.stack([mix(v).flatten() for v in one_each])
        added = added.view(T, units, width, -1)                 # (token, unit, value, outputs)
        expected = torch.einsum("tudc,tuec->ude", added, added) / T
        pull = ridge * expected.diagonal(dim1=1, dim2=2).mean() * eye(width)
        overlap = (overlaps()[0] / T).view(units, heads, heads)
        factor = refit.own_curvature(writes.weight, overlap, ridge)
        assert torch.allclose(factor @ factor.mT, expected + pull)


@pytest.mark.parametrize("changes", CHANGES)
def test_enough_steps_find_the_optimal_values(changes):
    """The least-squares solution of the whole problem, written out as one matrix, is no better."""
    cfg = tiny.config(**{"num_attention_heads": 6, **changes, "hidden_size": 8,
                         "intermediate_size": 6, "head_dim": 2})
    run, xs, norm = tiny.runner(cfg, 10), tiny.stream(cfg, 12, 10), torch.nn.Identity()
    block, target = run.block(tiny.block(cfg, 0)).requires_grad_(False), randn(12, 10, 8, seed=5)
    attention, mlp = block.self_attn, block.mlp
    for proj, writes, mixer in (
            (attention.v_proj, attention.o_proj, lambda n: refit.mix_heads(attention, n, run.rope)),
            (mlp.up_proj, mlp.down_proj, lambda n: refit.mix_channels(mlp, n))):
        mix, _, _ = mixer(xs)
        basis = eye(proj.weight.numel()).view(-1, *proj.weight.shape)
        columns = torch.stack([mix(xs @ unit.T).flatten() for unit in basis], 1)
        missing = (target - mix(proj(xs))).flatten()

        def left(steps, proj=proj, writes=writes, mixer=mixer, mix=mix, missing=missing):
            W = refit.new_values(proj, writes, xs, target, norm, mixer, run, 1e-3, steps)
            return float((missing - mix(xs @ (W - proj.weight).T).flatten()).square().sum())
        solution = torch.linalg.lstsq(columns, missing[:, None]).solution.flatten()
        least = missing - columns @ solution
        assert left(300) == pytest.approx(float(least.square().sum()), rel=1e-6)
        assert left(300) < left(refit.VALUE_STEPS) < left(1) < float(missing.square().sum())


@pytest.mark.parametrize("width", [2, 3])
def test_only_the_channels_that_write_most_are_compared_in_full(width, monkeypatch):
    """They are half again as many as stay, however many blocks are joined."""
    cfg, sizes, run = tiny.config(), [], tiny.runner(tiny.config(), 20)
    members, xs = [tiny.block(cfg, seed) for seed in range(width)], tiny.stream(cfg, 8, 20)
    full, middle = regression.eliminate, xs.clone()

    def eliminate(V, P, keep):
        sizes.append((len(V), keep))
        return full(V, P, keep)
    monkeypatch.setattr(refit, "eliminate", eliminate)
    weights, kept = refitted(members, xs, xs.clone(), run, parts=("eliminate",))
    assert sizes == [(60, 40)]
    run.attend(weights, middle)  # what the channels read
    wide = flatten_blocks(members)
    block = run.block(wide)
    with torch.no_grad():
        psi = block.mlp.channels(block.post_attention_layernorm(middle))
    sizes = psi.square().mean((0, 1)).sqrt() * wide["mlp.down_proj.weight"].norm(dim=0)
    writes = sizes.argsort(descending=True)[:60]
    stay = [member * 40 + i for member, channels in enumerate(kept["channels"]) for i in channels]
    assert len(stay) == 40 and set(stay) <= set(writes.tolist())


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 3])
def test_narrow_dtypes_stay_finite_with_large_activations_and_biases(changes, dtype, width):
    cfg = tiny.config(**changes)
    scales = {"self_attn.q_proj.bias": 100, "self_attn.k_proj.bias": 100,
              "mlp.gate_proj.weight": 12, "mlp.up_proj.weight": 12, "mlp.down_proj.weight": 0.01}
    members = [{name: tensor * scales.get(name, 1)
                for name, tensor in tiny.block(cfg, seed).items()} for seed in range(width)]
    start, errors = tiny.stream(cfg, 16, 20), []
    for kind in (torch.float64, dtype):
        run, xs = tiny.runner(cfg, 20, kind), start.to(kind)
        blocks = [{name: tensor.to(kind) for name, tensor in member.items()} for member in members]
        target = through(blocks, xs, run)
        ys = xs.clone()
        refitted(blocks, ys, xs.clone(), run)
        errors.append(relative_error(ys, target, xs))
    assert errors[1] == pytest.approx(errors[0], rel=0.15)


def test_blocks_that_all_write_nothing_can_be_merged():
    cfg = tiny.config()
    dead = tiny.silent(tiny.block(cfg, 0))
    xs = tiny.stream(cfg, 4, 12)
    before = xs.clone()
    refitted([dead, dead], xs, xs.clone(), tiny.runner(cfg, 12))
    assert torch.allclose(xs, before)


def test_a_fit_that_the_stored_dtype_cannot_hold_is_refused_with_the_groups_name():
    cfg = tiny.config()
    members = [{name: tensor.half() for name, tensor in tiny.block(cfg, seed).items()}
               for seed in (0, 1)]
    xs = tiny.stream(cfg, 4, 12).float()
    with pytest.raises(ValueError, match=r"blocks \[0, 1\]: .*NaN or infinity"):
        refitted(members, xs, 1e9 * xs, tiny.runner(cfg, 12, torch.float32))


@pytest.mark.parametrize("n, tokens, expected", [
    (5, None, 5), (32, None, 32), (40, None, 32), (128, None, 32), (128, 999, 32), (128, 80, 8),
    (128, 89, 8), (5, 80, 5), (128, 3, 1)])
def test_few_windows_are_spread_over_all(n, tokens, expected):
    """Of windows with 10 tokens each, few() takes 32, or those that hold `tokens`."""
    chosen = refit.few(torch.arange(n)[:, None].expand(n, 10), tokens)[:, 0].tolist()
    step = -(-n // expected)
    assert len(set(chosen)) == expected and chosen[0] == 0 and chosen[-1] >= n - step - 1


def test_products_are_means_over_tokens():
    cfg, xs = tiny.config(), tiny.stream(tiny.config(), 5, 12)
    run = tiny.runner(cfg, 12)
    product, gram = regression.means(run, [xs, 2 * xs], lambda a, b: [(a, b), (a, a)])
    flat = xs.flatten(0, 1)
    expected = flat.T @ flat / len(flat)
    assert torch.allclose(product, 2 * expected)
    assert torch.allclose(gram.tril(), expected.tril())  # only its lower triangle is computed


def test_the_least_damage_to_four_blocks():
    """The pair that alone does least is in the way of the best two."""
    damage = {(0, 1): 0.3, (1, 2): 0.1, (2, 3): 0.3, (0, 2): 1.0, (1, 3): 1.0}
    for merges, expected in ((0, [[0], [1], [2], [3]]), (1, [[0], [1, 2], [3]]),
                             (2, [[0, 1], [2, 3]])):
        tiny.expect(f"{merges} merges of 4 blocks, with the damage {damage}", expected,
                    grouping.least_damage(damage, 4, merges))


@pytest.mark.parametrize("merges", [1, 2, 3, 4])
def test_least_damage_is_the_best_of_all_partitions(merges):
    L, rng = 6, torch.Generator().manual_seed(merges)
    damage = {(i, j): float(torch.rand(1, generator=rng))
              for i in range(L) for j in range(i + 1, min(i + 3, L))}

    def partitions():
        for cuts in itertools.combinations(range(1, L), L - merges - 1):
            yield [list(range(a, b)) for a, b in itertools.pairwise((0, *cuts, L))]

    def cost(groups):
        return sum(damage.get((group[0], group[-1]), torch.inf)
                   for group in groups if len(group) > 1)
    groups = grouping.least_damage(damage, L, merges)
    tiny.expect(f"{merges} merges of {L} blocks, with random damage", min(partitions(), key=cost),
                groups)


def test_least_damage_to_many_blocks_is_found_without_trying_all_partitions():
    """The pairs 0+1, 4+5, 8+9 and so on do none, and all other groups do some."""
    damage = {(i, j): float(i % 4 != 0 or j - i > 1)
              for i in range(60) for j in range(i + 1, min(i + 3, 60))}
    found = grouping.least_damage(damage, 60, 15)
    tiny.expect("the pairs among the groups, as the first block of each", list(range(0, 60, 4)),
                [group[0] for group in found if len(group) > 1])


def test_more_merges_than_the_tried_groups_allow_are_refused():
    with pytest.raises(ValueError):
        grouping.least_damage({(i, i + 1): 1.0 for i in range(3)}, 4, 3)


@pytest.mark.parametrize("n, T, made, judged", [
    (32, 512, range(0, 32, 4), [1, 17]), (8, 2048, [0, 2, 4, 6], [1, 5]), (3, 9999, [0], [1, 2]),
    (128, 256, range(0, 128, 8), [1, 33, 65, 97]), (128, 2048, [0, 32, 64, 96], [1, 65]),
    (2, 12, [0], [1]), (1, 16, [0], [0])])
def test_other_windows_judge_a_trial_merge_than_made_it(n, T, made, judged):
    build, judge = grouping.split(torch.arange(n)[:, None].expand(n, T))
    assert (build[:, 0].tolist(), judge[:, 0].tolist()) == (list(made), judged)


def test_long_groups_are_tried_where_their_parts_did_little_damage():
    pairs = {(0, 1): 1.0, (1, 2): 5.0, (2, 3): 1.0, (3, 4): 2.0, (4, 5): 9.0}
    assert grouping.candidates({}, 6, 2, 1) == list(pairs)
    assert grouping.candidates(pairs, 6, 3, 3) == [(0, 2), (2, 4)]  # the two least of 6, 6, 3, 11
    assert grouping.candidates(pairs | {(0, 2): 1.0, (2, 4): 1.0}, 6, 4, 3) == []
    assert grouping.candidates(pairs, 2, 3, 1) == []
    # pairs alone make three merges at most, so for four merges all triples are tried
    assert grouping.candidates(pairs, 6, 3, 4) == [(0, 2), (1, 3), (2, 4), (3, 5)]


def test_damage_is_that_of_the_model_with_one_merge():
    """The trial merge keeps the first member, so it does no damage where the second is dead."""
    cfg = tiny.config(num_hidden_layers=4)
    blocks = [tiny.block(cfg, seed) for seed in range(4)]
    blocks[2] = tiny.silent(blocks[2])
    source = Network(cfg, blocks, tiny.random_tensors(cfg.outer_shapes(), 99))
    tokens, run = torch.randint(300, (16, 12), generator=g.manual_seed(0)), tiny.runner(cfg, 12)

    def first_member(dense):
        def attention(members, xs):
            assert torch.equal(xs, dense)
            return members[0], {}
        return attention, lambda block, xs: (block, {})
    damage = grouping.damages(source, tokens, run, first_member, 2, {})
    assert damage.pop((1, 2)) == 0 and all(value > 0 for value in damage.values())
    triple = (0, 2) if damage[0, 1] < damage[2, 3] else (1, 3)  # whose other pair did less damage
    assert damage.keys() == {(0, 1), (2, 3), triple}


@pytest.mark.parametrize("ratio, largest, damages", [(0.1, 2, [0.0]), (0.2, 3, [0.0, 0.25])])
def test_a_trial_merge_is_the_fit_and_as_large_as_can_be_used(ckpt, text_file, tmp_path, cli,
                                                              monkeypatch, ratio, largest, damages):
    seen = []

    def no_damage(source, tokens, runner, halves, merges, needs, largest):
        attention, _ = halves(torch.zeros(1, 4, 32))
        streams = needs["streams of trials"]
        seen.append((attention.__self__.parts, attention.__self__.ridge, largest, streams))
        return {(i, i + 1): i / 8 for i in range(source.config.num_hidden_layers - 1)}
    monkeypatch.setattr(refit, "damages", no_damage)
    code, out, err = cli(refit.main, "--ckpt", ckpt, "--data", text_file, "--samples", 4,
                         "--length", 16, "--ratio", ratio, "--no-eval", "--ridge", 2.0, "--out",
                         tmp_path / "a")
    assert code == 0, err
    assert seen == [(refit.PARTS, 2.0, largest, 4 * 2 * 16 * 32 * 4)]  # four pairs, two windows
    groups = json.loads((tmp_path / "a" / "flatten.json").read_text())["groups"]
    assert [group.get("damage") for group in groups if len(group["blocks"]) > 1] == damages
    assert f"damage {damages[0]:.3f}" in out


@pytest.mark.parametrize("group_by", ["similarity", "damage"])
def test_a_refitted_checkpoint_opens_everywhere_and_can_be_repeated(ckpt, text_file, tmp_path, cli,
                                                                    group_by):
    run = ["--ckpt", ckpt, "--data", text_file, "--samples", 8, "--length", 32, "--ratio", 0.2,
           "--group-by", group_by]
    code, out, err = cli(refit.main, *run, "--out", tmp_path / "a")
    assert (code, err) == (0, "") and "refit" in out
    words = json.loads((tmp_path / "a" / "flatten.json").read_text())["command"].split()
    assert words[:3] == ["python", "-m", "beyond.refit"]
    assert cli(refit.main, *words[3:], "--out", tmp_path / "b")[0] == 0
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(20)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    with torch.inference_mode():
        assert torch.allclose(theirs(ids).logits, load(tmp_path / "a")(ids), atol=1e-5)
    assert Checkpoint(tmp_path / "a").config.parameters() < Checkpoint(ckpt).config.parameters()


def test_groups_by_damage_are_at_most_three(ckpt, cli):
    code, _, err = cli(refit.main, "--ckpt", ckpt, "--max-group", 4)
    assert code == 2 and "at most 3" in err and err.count("\n") == 1
