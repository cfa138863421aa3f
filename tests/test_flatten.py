"""Grouping, folding and concatenation.

Depth becomes width: exactly where it should, and approximately where it must.
"""
import itertools
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
    what = f"of the wide block of {members}, which is to be the sum of its members'"
    tiny.expect(f"the attention {what}", sum(a for a, _ in each), attention)
    tiny.expect(f"the MLP {what}", sum(m for _, m in each), mlp)


def test_flattened_shapes_are_those_of_a_wide_block(cfg):
    wide = flatten_blocks([tiny.block(cfg, i) for i in range(3)])
    assert wide.keys() == cfg.block_shapes(3).keys()
    for name, shape in cfg.block_shapes(3).items():
        tiny.expect(f"the shape of {name} of three blocks", shape, tuple(wide[name].shape))


def test_folding_norms_changes_nothing_but_the_norms(cfg):
    block, x = tiny.block(cfg, 0), tiny.stream(cfg)
    folded = fold_norms(block)
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        tiny.expect(f"{norm} afterwards", torch.ones_like(block[norm]), folded[norm])
        tiny.expect(f"{norm} of the block that was given, which stays as it was",
                    tiny.block(cfg, 0)[norm], block[norm])
    tiny.expect("the stream after the folded block", through([block], cfg, x),
                through([folded], cfg, x))


def test_folding_multiplies_in_float32_and_rounds_once():
    """A norm in float32 over weights in bfloat16: neither is rounded before the product is."""
    block = {name: tensor.bfloat16() for name, tensor in tiny.block(tiny.config(), 0).items()}
    row = torch.tensor([[1.0, 3.0] * 16])
    block["mlp.up_proj.weight"] = row.bfloat16()
    block["post_attention_layernorm.weight"] = torch.tensor([2.0, 1 + 2 ** -9] * 16)
    # 3 (1 + 2^-9) lies just below half way from 3 to 3.015625, the next in bfloat16.
    tiny.expect("up_proj [1, 3] behind a norm [2, 1.00195], in bfloat16",
                torch.tensor([2.0, 3.0]).bfloat16(), fold_norms(block)["mlp.up_proj.weight"][0, :2],
                atol=0, rtol=0)
    block["post_attention_layernorm.weight"] = torch.tensor([2.0, 1 + 3 * 2 ** -10] * 16)
    # A norm rounded to bfloat16 first would be 1 and leave 3.
    tiny.expect("up_proj [1, 3] behind a norm [2, 1.00293], in bfloat16",
                torch.tensor([2.0, 3.015625]).bfloat16(),
                fold_norms(block)["mlp.up_proj.weight"][0, :2], atol=0, rtol=0)


def test_a_single_block_is_returned_as_it_is():
    block = tiny.block(tiny.config(), 0)
    assert flatten_blocks([block]) is block, \
        "one block alone\nexpected: the same dictionary, untouched\ncame:     another one"


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


def test_the_worked_example_of_greedy_grouping():
    expected = [[[0], [1], [2, 3], [4]], [[0], [1, 2, 3], [4]], [[0], [1, 2, 3, 4]]]
    for merges, groups in enumerate(expected, 1):
        tiny.expect(f"{merges} merges of the worked example", groups,
                    select_groups(example(), merges, 5))


@pytest.mark.parametrize("blocks", [3, 4, 9])
def test_each_merge_joins_the_neighbours_whose_ends_are_most_alike(blocks):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        S = torch.randint(100, (blocks, blocks), generator=generator).double() / 100
        before = [[i] for i in range(blocks)]
        for merges in range(1, blocks):
            after = select_groups(S, merges, blocks)
            what = f"{merges} merges for S = {tiny.shown(S)}"
            joined = [group for group in after if group not in before]
            tiny.expect(f"{what}: groups that were not there one merge before", 1, len(joined))
            tiny.expect(f"{what}: all blocks, in order", list(range(blocks)),
                        [i for group in after for i in group])
            most = max(float(S[left[0], right[-1]])
                       for left, right in itertools.pairwise(before))
            tiny.expect(f"{what}\nwith the ends of {joined[0]} as alike as any to be joined",
                        most, float(S[joined[0][0], joined[0][-1]]))
            before = after


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
    cfg = tiny.config(**raw)
    tiny.expect(f"merges for a ratio of {ratio}, if a block has {cfg.block_parameters():,} of "
                f"{cfg.parameters():,} parameters", merges, merges_for_ratio(cfg, ratio, 32))


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
