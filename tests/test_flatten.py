"""Grouping, folding and concatenation.

Depth becomes width: exactly where it should, and approximately where it must.
"""
import math

import pytest
import tiny
import torch
from torch.testing import assert_close

from checkpoint.reader import Checkpoint
from flatten import (
    check_flattenable,
    flatten_blocks,
    fold_norms,
    mergeable,
    merges_for_ratio,
    select_groups,
)
from model import Block

FAMILIES = {"qwen2": {}, "llama": {"model_type": "llama"}, "qwen3": {"model_type": "qwen3"},
            "mqa": {"num_key_value_heads": 1}, "mha": {"num_key_value_heads": 6}}


@pytest.fixture(params=FAMILIES)
def cfg(request):
    return tiny.config(**FAMILIES[request.param])


def parts(weights, cfg, x):
    """Return what a block's attention and its MLP add, each for the stream x."""
    run, block = tiny.runner(cfg, x.shape[1]), Block(weights, cfg)
    with torch.no_grad():
        return block.attend(x, run.rope), block.feed(x)


def through(blocks, cfg, x):
    run = tiny.runner(cfg, x.shape[1])
    with torch.no_grad():
        for weights in blocks:
            x = Block(weights, cfg)(x, run.rope)
    return x


def scaled(weights, scale):
    """Return a block that writes `scale` times what it wrote before."""
    written = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    return weights | {name: scale * weights[name] for name in written}


@pytest.mark.parametrize("members", [2, 3])
def test_a_flattened_block_is_the_sum_of_its_members_for_any_input(cfg, members):
    blocks, x = [tiny.block(cfg, i) for i in range(members)], tiny.stream(cfg)
    attention, mlp = parts(flatten_blocks(blocks), cfg, x)
    each = [parts(block, cfg, x) for block in blocks]
    assert_close(attention, sum(a for a, _ in each))
    assert_close(mlp, sum(m for _, m in each))


def test_flattened_shapes_are_those_of_a_wide_block(cfg):
    wide = flatten_blocks([tiny.block(cfg, i) for i in range(3)])
    assert {name: tuple(t.shape) for name, t in wide.items()} == cfg.block_shapes(3)


def test_folding_norms_changes_nothing_but_the_norms(cfg):
    block, x = tiny.block(cfg, 0), tiny.stream(cfg)
    folded = fold_norms(block)
    assert_close(through([folded], cfg, x), through([block], cfg, x))
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert (folded[norm] == 1).all()
        assert torch.equal(block[norm], tiny.block(cfg, 0)[norm])  # the input stays as it was


def test_folding_multiplies_in_float32_and_rounds_once():
    cfg = tiny.config()
    block = {name: tensor.bfloat16() for name, tensor in tiny.block(cfg, 0).items()}
    up, norm = block["mlp.up_proj.weight"], block["post_attention_layernorm.weight"]
    expected = (up.double() * norm.double()).float().bfloat16()
    assert torch.equal(fold_norms(block)["mlp.up_proj.weight"], expected)


def test_a_single_block_is_returned_as_it_is():
    block = tiny.block(tiny.config(), 0)
    assert flatten_blocks([block]) is block


def test_flattening_a_silent_block_changes_nothing(cfg):
    a, b, x = tiny.block(cfg, 0), scaled(tiny.block(cfg, 1), 0), tiny.stream(cfg)
    assert_close(through([flatten_blocks([a, b])], cfg, x), through([a], cfg, x))
    assert_close(through([flatten_blocks([b, a])], cfg, x), through([a], cfg, x))


def test_the_error_of_flattening_is_of_second_order():
    """Halve what both blocks write, and the error of reading the same input falls by four."""
    cfg, x = tiny.config(), tiny.stream(tiny.config())

    def error(scale):
        blocks = [scaled(tiny.block(cfg, seed), scale) for seed in range(2)]
        side_by_side, in_turn = through([flatten_blocks(blocks)], cfg, x), through(blocks, cfg, x)
        return float((side_by_side - in_turn).norm())
    assert error(1e-2) / error(5e-3) == pytest.approx(4, rel=0.05)


# ---- grouping

def example():
    """Return the similarities of the worked example, for five blocks."""
    return torch.tensor([[1.00, 0.80, 0.70, 0.62, 0.55],
                         [0.80, 1.00, 0.92, 0.90, 0.74],
                         [0.70, 0.92, 1.00, 0.97, 0.83],
                         [0.62, 0.90, 0.97, 1.00, 0.88],
                         [0.55, 0.74, 0.83, 0.88, 1.00]])


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


def test_the_worked_example_of_greedy_grouping():
    S = example()
    assert select_groups(S, 1, 5) == [[0], [1], [2, 3], [4]]
    assert select_groups(S, 2, 5) == [[0], [1, 2, 3], [4]]
    assert select_groups(S, 3, 5) == [[0], [1, 2, 3, 4]]


@pytest.mark.parametrize("seed", range(20))
def test_comparing_ends_is_deleting_a_row_and_a_column(seed):
    S = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed))
    for merges in range(1, 9):
        assert select_groups(S, merges, 9) == literal_grouping(S, merges)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("max_group", [2, 3, 4])
def test_max_group_is_respected_and_never_runs_into_a_dead_end(seed, max_group):
    S = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed))
    most = mergeable([[i] for i in range(9)], max_group)
    assert most == 9 - math.ceil(9 / max_group)
    for merges in range(1, most + 1):
        groups = select_groups(S, merges, max_group)
        assert len(groups) == 9 - merges and max(map(len, groups)) <= max_group
        assert [i for group in groups for i in group] == list(range(9))


def test_max_group_takes_the_most_alike_of_the_merges_it_allows():
    S = example()  # without a limit the second merge makes {2, 3, 4}
    assert select_groups(S, 2, 2) == [[0, 1], [2, 3], [4]]
    S[3, 4] = 0.99
    assert select_groups(S, 2, 2) == [[0], [1, 2], [3, 4]]
    S[0, 1] = 0.95
    assert select_groups(S, 2, 2) == [[0, 1], [2], [3, 4]]


def test_ties_merge_the_first_pair():
    assert select_groups(torch.ones(4, 4), 1, 4) == [[0, 1], [2], [3]]


# ---- ratio

LLAMA2_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
             "vocab_size": 32000, "head_dim": 128}
QWEN15_7B = LLAMA2_7B | {"model_type": "qwen2", "vocab_size": 151936}


@pytest.mark.parametrize("raw, ratio, merges", [
    (LLAMA2_7B, 0.2, 7), (LLAMA2_7B, 0.2102, 7), (LLAMA2_7B, 0.2104, 8),  # 7 remove 0.21024
    (LLAMA2_7B, 0.001, 1), (QWEN15_7B, 0.2, 8), (QWEN15_7B, 0.1834, 7)])
def test_the_ratio_counts_all_parameters_and_is_reached(raw, ratio, merges):
    assert merges_for_ratio(tiny.config(**raw), ratio, 32) == merges


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 20, float("nan"), float("inf")])
def test_ratios_outside_0_to_1_are_refused(ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        merges_for_ratio(tiny.config(), ratio, 5)


def test_ratios_out_of_reach_are_refused_with_what_is_possible():
    with pytest.raises(ValueError, match="31 merges"):
        merges_for_ratio(tiny.config(**LLAMA2_7B), 0.95, 32)
    with pytest.raises(ValueError, match="16 merges"):
        merges_for_ratio(tiny.config(**LLAMA2_7B), 0.6, 2)


def test_blocks_of_different_attention_are_not_joined(tmp_path):
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    path = tiny.checkpoint(tmp_path / "m", layer_types=kinds, sliding_window=64,
                           use_sliding_window=True)
    with pytest.raises(ValueError, match="layer_types"):
        check_flattenable(Checkpoint(path))
