"""The graded exercises: which function a student writes, and which tests judge it. EXERCISES.md explains each."""
import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
POINTS = 10  # for each exercise


@dataclass(frozen=True)
class Exercise:
    number: int
    file: str                # of the project, and of a submission
    function: str            # "name" or "Class.name"
    test_file: str
    tests: tuple[str, ...]


EXERCISES = [Exercise(number, *rest) for number, rest in enumerate([
    ("model.py", "rotate", "tests/test_model.py", ("test_rotation_depends_on_the_distance_only",
                                                   "test_rotation_turns_pairs_half_a_head_apart")),
    ("flatten.py", "fold_norms", "tests/test_flatten.py", ("test_folding_norms_changes_nothing_but_the_norms",
                                                           "test_folding_multiplies_in_float32_and_rounds_once")),
    ("calibrate.py", "cosine_sums", "tests/test_calibrate.py", ("test_cosines_of_zero_and_equal_streams",
                                                                "test_cosine_sums_of_two_streams_written_out")),
    ("flatten.py", "select_groups", "tests/test_flatten.py", ("test_the_worked_example_of_greedy_grouping",
                                                              "test_comparing_ends_is_deleting_a_row_and_a_column")),
    ("flatten.py", "flatten_blocks", "tests/test_flatten.py", (
        "test_a_flattened_block_is_the_sum_of_its_members_for_any_input", "test_flattened_shapes_are_those_of_a_wide_block",
        "test_a_single_block_is_returned_as_it_is")),
    ("flatten.py", "merges_for_ratio", "tests/test_flatten.py", (
        "test_the_ratio_counts_all_parameters_and_is_reached",
        "test_ratios_out_of_reach_are_refused_with_what_is_possible")),
    ("prune.py", "query_heads_of", "tests/test_prune.py", ("test_query_heads_of_kv_heads",)),
    ("prune.py", "head_importance", "tests/test_prune.py", (
        "test_head_importance_is_size_times_row_norm_summed_over_a_kv_head",)),
    ("prune.py", "prune_attention", "tests/test_prune.py", ("test_kept_queries_still_meet_their_keys",)),
    ("prune.py", "ridge_leverage", "tests/test_prune.py", (
        "test_leverage_is_the_diagonal_of_its_definition",
        "test_leverage_lies_in_0_to_1_and_sums_to_the_effective_dimension")),
    ("prune.py", "nystrom_down", "tests/test_prune.py", (
        "test_keeping_every_channel_is_the_identity", "test_compensation_is_the_ridge_least_squares_optimum",
        "test_dropping_one_of_two_equal_channels_adds_their_rows")),
    ("evaluate.py", "window_losses", "tests/test_evaluate.py", ("test_losses_in_pieces_are_the_mean_over_the_window",)),
    ("evaluate.py", "losses_streamed", "tests/test_evaluate.py", (
        "test_perplexity_equals_the_plain_loop_streamed_or_not",)),
    ("beyond/regression.py", "eliminate_units", "tests/test_beyond.py", (
        "test_elimination_is_greedy_by_brute_force_and_leaves_the_optimum",)),
], start=1)]


def find(source: str, function: str) -> ast.FunctionDef:
    """The definition of "name" or "Class.name" in a file's text. ValueError if it is not there or the file is not Python."""
    try:
        nodes = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"not valid Python: {error.msg} in line {error.lineno}") from None
    for part in function.split("."):
        found = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        if not found:
            raise ValueError(f"no {function}")
        nodes = found[-1].body
    return found[-1]


def body_lines(source: str, function: str) -> tuple[int, int]:
    """(first, last + 1) of the lines, counted from 0, of a function's body without its docstring."""
    node = find(source, function)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        raise ValueError(f"{function} has no body")
    return body[0].lineno - 1, body[-1].end_lineno


def get_body(source: str, function: str) -> str:
    """The text of a function's body, docstring left out."""
    first, last = body_lines(source, function)
    return "\n".join(source.split("\n")[first:last])


def set_body(source: str, function: str, body: str) -> str:
    """A file's text with another body for a function; the docstring stays."""
    first, last = body_lines(source, function)
    lines = source.split("\n")
    return "\n".join([*lines[:first], body, *lines[last:]])
