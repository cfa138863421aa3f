"""Blocks that share a block: the low-rank differences, and the size of what is made."""
import pytest
import tiny
import torch
from test_compare import calibration, logits, network, random_network

from compare import sharing
from compare.sharing import affordable_rank, low_rank, matrices, moments, tied_low_rank


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(n: int, seed: int = 5) -> torch.Tensor:
    """Inputs x (tokens, n) with unequal and mixed channels."""
    scales = torch.logspace(1, -2, n, dtype=torch.float64)
    return numbers(200, n, seed=seed) * scales @ numbers(n, n, seed=seed + 1)


def error(D: torch.Tensor, made: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (D - made).T).square().sum(1).mean())


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_a_low_rank_difference_is_the_whitened_svd_truncated(shape):
    """With A = R R, R symmetric: the SVD of D R at rank r, times R^-1; its error is what it drops.
    """
    D, x = numbers(*shape), inputs(shape[1])
    A = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(A)
    R = vectors * values.sqrt() @ vectors.T
    U, S, V = torch.linalg.svd(D @ R, full_matrices=False)
    for rank in (0, 1, 3, 8):
        expected = U[:, :rank] * S[:rank] @ V[:rank] @ torch.linalg.inv(R)
        made = low_rank(D, A, rank)
        assert torch.allclose(made, expected, atol=1e-6)
        assert error(D, made, x) == pytest.approx(float(S[rank:].square().sum()), abs=1e-6)
        assert torch.linalg.matrix_rank(made) == rank


def test_no_other_matrix_of_the_rank_writes_less_error():
    """Neither near it, nor the plain SVD, which does not know the inputs."""
    D, x = numbers(10, 8), inputs(8)
    made = low_rank(D, x.T @ x / len(x), 3)
    least = error(D, made, x)
    U, S, V = torch.linalg.svd(made, full_matrices=False)
    left, right = U[:, :3] * S[:3], V[:3]
    for seed in range(200):
        size = 10.0 ** -(seed % 5)
        other = ((left + size * numbers(10, 3, seed=seed))
                 @ (right + size * numbers(3, 8, seed=seed + 999)))
        assert error(D, other, x) > least
    U, S, V = torch.linalg.svd(D)
    assert error(D, U[:, :3] * S[:3] @ V[:3], x) > 1.05 * least


def test_inputs_that_never_come_do_not_matter():
    """A second moment without full rank needs neither root nor inverse."""
    D, x = numbers(10, 8), inputs(8)
    x[:, 4:] = 0
    assert error(D, low_rank(D, x.T @ x, 4), x) < 1e-20


def test_full_rank_is_the_dense_model(monkeypatch):
    dense = random_network(6)
    text = calibration(dense)
    monkeypatch.setattr(sharing, "affordable_rank", lambda *_: (1000, 0))
    assert torch.equal(logits(tied_low_rank(dense, 2, text), text), logits(dense, text))
    D, x = numbers(10, 8), inputs(8)
    assert torch.allclose(low_rank(D, x.T @ x, 10), D, atol=1e-12)


def test_equal_blocks_share_one_at_no_loss(monkeypatch):
    block = tiny.block(tiny.config(), 0)
    dense = network([block] * 5)
    text = calibration(dense)
    monkeypatch.setattr(sharing, "affordable_rank", lambda *_: (0, 0))
    assert torch.allclose(logits(tied_low_rank(dense, 2, text), text), logits(dense, text),
                          atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_parameters_are_those_of_the_flattened_model_and_hardly_fewer(n):
    """Counted as they would be stored: what is shared once, differences as two thin matrices."""
    dense = random_network(9)
    text = calibration(dense)
    made = tied_low_rank(dense, n, text)
    flattened = dense.parameters() - n * dense.config.block_parameters()
    groups = sharing.groups_of(dense, sharing.merges_of(n, 9), text)
    rank, _ = affordable_rank(dense.blocks[0], groups, n)
    stored = dense.parameters()
    for group in groups:
        for W in matrices(dense.blocks[0]).values() if len(group) > 1 else []:
            stored += W.numel() - len(group) * W.numel()
            stored += len(group) * min(rank * sum(W.shape), W.numel())
    assert rank > 0 and made.parameters() == stored
    members = sum(len(group) for group in groups if len(group) > 1)
    one_rank = members * sum(sum(W.shape) for W in matrices(dense.blocks[0]).values())
    assert flattened - one_rank < stored <= flattened
    assert len(made.blocks) == 9 and not made.ordinary


def test_too_little_sharing_is_refused():
    with pytest.raises(ValueError, match="save less than 3 blocks"):
        affordable_rank(random_network(6).blocks[0], [[0, 1, 2, 3], [4], [5]], 3)


def test_moments_are_of_what_each_projection_reads():
    cfg = tiny.config()
    weights, xs = tiny.block(cfg, 0), tiny.stream(cfg)
    runner = tiny.runner(cfg, 12)
    block, read = runner.block(weights), {}
    for part in (block.self_attn, block.mlp):
        for name, layer in part.named_children():
            layer.register_forward_hook(
                lambda _, x, __, name=name: read.update({name: x[0].flatten(0, -2)}))
    after = block(xs, runner.rope)
    ys = xs.clone()
    A = moments(weights, ys, runner)
    assert torch.allclose(ys, after)
    assert {name.split(".")[-2] for name in matrices(weights)} == A.keys()
    for name, moment in A.items():
        assert torch.allclose(moment, read[name].T @ read[name])
