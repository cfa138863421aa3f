"""The graded exercises: which function a student writes, and which tests judge it.

course/EXERCISES.md explains each.
"""
import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
POINTS = 10   # for each exercise
SECONDS = 60  # within which the tests of an ordinary exercise must end


@dataclass(frozen=True)
class Exercise:
    number: int
    file: str                # of the project, and of a submission
    function: str            # "name" or "Class.name"
    test_file: str
    tests: tuple[str, ...]   # each is worth the same
    secrets: tuple[str, ...]  # what gives the solution away, in code and in documents
    seconds: int = SECONDS   # within which the tests must end


EXERCISES = [
    Exercise(1, "model.py", "rotate", "tests/test_model.py", (
        "test_rotation_depends_on_the_distance_only",
        "test_rotation_turns_pairs_half_a_head_apart"),
        ("left * cos - right * sin",)),
    Exercise(2, "flatten.py", "fold_norms", "tests/test_flatten.py", (
        "test_folding_norms_changes_nothing_but_the_norms",
        "test_folding_multiplies_in_float32_and_rounds_once"),
        ("block[name].to(a.dtype) * a", "W diag(a)")),
    Exercise(3, "calibrate.py", "cosine_sums", "tests/test_calibrate.py", (
        "test_cosines_of_zero_and_equal_streams",
        "test_cosine_sums_of_two_streams_written_out"),
        ("F.normalize(x[t:t + step]", "unit @ unit.T")),
    Exercise(4, "calibrate.py", "spread", "tests/test_calibrate.py", (
        "test_every_token_of_a_short_text_is_in_the_sample",
        "test_each_stretch_of_the_text_gives_one_token_of_the_sample",
        "test_a_sample_is_the_same_each_time_and_meets_any_position_of_a_window"),
        ("(torch.arange(n) + chance)",)),
    Exercise(5, "flatten.py", "merges_for_ratio", "tests/test_flatten.py", (
        "test_the_ratio_counts_all_parameters_and_is_reached",
        "test_ratios_out_of_reach_are_refused_with_what_is_possible"),
        ("merges * share >= ratio",)),
    Exercise(6, "flatten.py", "select_groups", "tests/test_flatten.py", (
        "test_the_worked_example_of_greedy_grouping",
        "test_each_merge_joins_the_neighbours_whose_ends_are_most_alike"),
        ("S[merged[p][0], merged[p][-1]]", "groups[p:p + 2] = [groups[p] + groups[p + 1]]")),
    Exercise(7, "flatten.py", "flatten_blocks", "tests/test_flatten.py", (
        "test_a_flattened_block_is_the_sum_of_its_members_for_any_input",
        "test_flattened_shapes_are_those_of_a_wide_block",
        "test_a_single_block_is_returned_as_it_is"),
        ("dim=1 if name in WRITES else 0",)),
    Exercise(8, "prune.py", "query_heads_of", "tests/test_prune.py", (
        "test_query_heads_of_kv_heads",),
        ("kv_heads[:, None] * n_rep", "j*n_rep .. j*n_rep")),
    Exercise(9, "prune.py", "head_importance", "tests/test_prune.py", (
        "test_head_importance_is_size_times_row_norm_summed_over_a_kv_head",),
        ("o_proj.to(sizes).norm(dim=0)", "E|o_c| |W_O,c|")),
    Exercise(10, "prune.py", "prune_attention", "tests/test_prune.py", (
        "test_kept_queries_still_meet_their_keys",
        "test_with_head_norms_the_heads_of_one_member_work_as_in_that_member"),
        ('[:, keep["q"]]',)),
    Exercise(11, "prune.py", "ridge_leverage", "tests/test_prune.py", (
        "test_leverage_of_two_channels_in_numbers",
        "test_leverage_is_the_weight_of_a_channel_in_its_own_regression",
        "test_leverage_lies_in_0_to_1_and_sums_to_the_effective_dimension"),
        ("[(C + ridge I)^-1]_ii",
         "[C (C + ridge I)^-1]_ii",
         "[C (C + lambda I)^-1]_ii",
         "ridge * inverse_diagonal",
         "C @ torch.linalg.inv(C")),
    Exercise(12, "prune.py", "nystrom_down", "tests/test_prune.py", (
        "test_keeping_every_channel_is_the_identity",
        "test_dropping_one_of_two_equal_channels_adds_their_rows",
        "test_compensation_is_the_ridge_least_squares_optimum"),
        ("C_RK (C_KK + ridge I)^-1",
         "C_RK (C_KK + lambda I)^-1",
         "cholesky_solve(to_fold, factor)",
         "solve(C_KK + ridge")),
    Exercise(13, "evaluate.py", "window_losses", "tests/test_evaluate.py", (
        "test_losses_in_pieces_are_the_mean_over_the_window",),
        ("window[:-1].split(1024)",)),
    Exercise(14, "evaluate.py", "losses_streamed", "tests/test_evaluate.py", (
        "test_streamed_losses_read_each_block_once",
        "test_perplexity_equals_the_plain_loop_streamed_or_not"),
        ("run_block(source.block(i), xs)",), seconds=180),
    Exercise(15, "beyond/lora.py", "LoRA.merged", "tests/test_recover.py", (
        "test_lora_changes_nothing_at_first_and_merging_changes_nothing_at_last",),
        ("self.scale * self.B @ self.A",)),
    Exercise(16, "beyond/lessons.py", "teacher_loss", "tests/test_recover.py", (
        "test_the_teachers_loss_of_two_words_in_numbers",
        "test_the_divergence_from_itself_is_zero_and_has_no_gradient",
        "test_the_teachers_loss_is_cross_entropy_minus_the_teachers_entropy"),
        ("kullback_leibler(teachers.float()",)),
    Exercise(17, "compare/width.py", "narrower", "tests/test_compare.py", (
        "test_nothing_gets_narrower_if_nothing_must_go",
        "test_width_keeps_the_parameter_budget",
        "test_a_methods_own_biases_count_and_some_channel_must_stay"),
        ("(budget - attention - norms)",)),
    Exercise(18, "beyond/grouping.py", "least_damage", "tests/test_beyond.py", (
        "test_the_least_damage_to_four_blocks",
        "test_least_damage_is_the_best_of_all_partitions",
        "test_least_damage_to_many_blocks_is_found_without_trying_all_partitions",
        "test_more_merges_than_the_tried_groups_allow_are_refused"),
        ("best[start, before]",)),
    Exercise(19, "beyond/regression.py", "unit_costs", "tests/test_beyond.py", (
        "test_the_costs_of_two_rows_in_numbers",
        "test_a_cost_is_by_how_much_the_objective_grows",
        "test_elimination_is_greedy_by_brute_force_and_leaves_the_optimum"),
        ("tr(V_j^T [P_jj]^-1 V_j)",
         "|V_i|^2 / P_ii",
         "solve(P_own, V[units])",
         "M.diagonal() / P.diagonal()",
         "V.norm(dim=1).square() / diagonal")),
    Exercise(20, "parallel/__init__.py", "whole", "tests/test_parallel.py", (
        "test_what_each_process_puts_in_place_adds_up_to_the_whole",),
        ("everything[rank()::ranks()]",)),
]


def find(source: str, function: str) -> ast.FunctionDef:
    """Return the definition of "name" or "Class.name" in a file's text.

    ValueError if it is not there, or if the text is not Python. Of several definitions the last
    counts, as in Python itself.
    """
    try:
        nodes = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"not valid Python: {error.msg} in line {error.lineno}") from None
    for part in function.split("."):
        definitions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)
                       and node.name == part]
        if not definitions:
            raise ValueError(f"no {function}")
        nodes = definitions[-1].body
    return definitions[-1]


def body_lines(source: str, function: str) -> tuple[int, int]:
    """Return where a function's body starts and stops, without its docstring.

    They are (first line, last line + 1), lines counted from 0.
    """
    node = find(source, function)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        raise ValueError(f"{function} has no body")
    if body[0].lineno == node.lineno:
        raise ValueError(f"{function}: write the body on lines of its own, below the def")
    return body[0].lineno - 1, body[-1].end_lineno


def get_body(source: str, function: str) -> str:
    """Return the text of a function's body, docstring left out."""
    first, last = body_lines(source, function)
    return "\n".join(source.split("\n")[first:last])


def set_body(source: str, function: str, body: str) -> str:
    """Return a file's text with another body for a function; the docstring stays.

    ValueError if the body does not fit there.
    """
    first, last = body_lines(source, function)
    lines = source.split("\n")
    changed = "\n".join([*lines[:first], body, *lines[last:]])
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise ValueError(f"the body of {function} does not fit below its docstring: {error.msg}; "
                         "indent it by four spaces a level") from None
    return changed
