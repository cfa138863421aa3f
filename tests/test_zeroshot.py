"""Multiple choice: wording and splitting as in the harness, log-likelihoods as in transformers."""
import json
import math
import random
import re

import pytest
import tiny
import torch

from checkpoint.reader import Checkpoint
from compare import zeroshot
from compare.tasks import TASKS, Item, items
from compare.zeroshot import accuracies, encode_pair, log_likelihoods, right_losses
from text.tokenizer import load_tokenizer

ROWS = {  # one made-up question a task, in its published form
    "piqa": {"goal": "Dry a cup", "sol1": "Use a towel.", "sol2": "Use a lake."},
    "winogrande": {"sentence": "Ann thanked Eve because _ had helped. ", "option1": "Ann",
                   "option2": "Eve", "answer": "2"},
    "hellaswag": {"activity_label": "Cleaning",
                  "ctx_a": "[header] How to clean [title] Take a cloth.", "ctx_b": "then the cat",
                  "ctx": "", "endings": ["walks  off. [step] Done.", "sings."], "label": "1"},
    "arc_easy": {"question": {"stem": "What is hot?",
                              "choices": [{"text": "ice", "label": "1"},
                                          {"text": "fire", "label": "2"}]}, "answerKey": "2"},
    "openbookqa": {"question_stem": "Hot is",
                   "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
    "boolq": {"passage": "Fire is hot.", "question": "is fire hot", "answer": True},
}
ASKED = {  # what the harness makes of it: contexts and continuations; the second choice is right
    "piqa": (["Question: Dry a cup\nAnswer:"] * 2, [" Use a towel.", " Use a lake."]),
    "winogrande": (["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"],
                   [" had helped."] * 2),
    "hellaswag": (["Cleaning: How to clean. Take a cloth. Then the cat"] * 2,
                  [" walks off. Done.", " sings."]),
    "arc_easy": (["Question: What is hot?\nAnswer:"] * 2, [" ice", " fire"]),
    "openbookqa": (["Hot is"] * 2, [" ice", " fire"]),
    "boolq": (["Fire is hot.\nQuestion: is fire hot?\nAnswer:"] * 2, [" no", " yes"]),
}
FILES = {"piqa": "valid.jsonl", "winogrande": "dev.jsonl", "hellaswag": "hellaswag_val.jsonl",
         "arc_easy": "ARC-Easy-Test.jsonl", "openbookqa": "test.jsonl", "boolq": "dev.jsonl"}


def write(folder, task, rows):
    """Write a task's file as it is published, with right labels for PIQA. Returns the file."""
    path = folder / task.split("_")[0] / FILES[task]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if task == "piqa":
        (path.parent / "valid-labels.lst").write_text("1\n" * len(rows))
    return path


@pytest.mark.parametrize("task", ROWS)
def test_questions_are_worded_as_in_the_harness(task, tmp_path):
    write(tmp_path, task, [ROWS[task]])
    item, = items(task, tmp_path)
    assert (item.contexts, item.continuations) == ASKED[task] and item.gold == 1
    # the harness takes the length of a choice: with the partial scoring of WinoGrande, the context
    choices = item.contexts if task == "winogrande" else [text[1:] for text in item.continuations]
    assert item.lengths == [len(choice) for choice in choices]


def test_openbookqa_in_its_own_nested_form():
    choices = [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]
    item = TASKS["openbookqa"].item({"question": {"stem": "Hot is", "choices": choices},
                                     "answerKey": "B"})
    assert (item.contexts, item.continuations) == ASKED["openbookqa"] and item.gold == 1


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge"])
@pytest.mark.parametrize("labels, answer", [(["1", "2"], "2"), (["A", "B"], "B"), ([1, 2], 2)])
def test_arc_as_dataset_hubs_export_it(task, labels, answer):
    row = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": labels},
           "answerKey": answer}
    item = TASKS[task].item(row)
    assert (item.contexts, item.continuations) == ASKED["arc_easy"] and item.gold == 1


def test_exported_files_are_found_by_task_and_split(tmp_path):
    """Each lies beside an export of another split, in which there is no question."""
    for split, name, row in (
            ("validation", "piqa/validation.jsonl", ROWS["piqa"] | {"label": 1}),
            ("validation", "hellaswag_validation.jsonl", ROWS["hellaswag"]),
            ("test", "ARC-Easy/test-00000-of-00001.jsonl", ROWS["arc_easy"]),
            ("test", "ARC-Challenge/test-00000-of-00001.jsonl",
             ROWS["arc_easy"] | {"answerKey": "1"})):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
        path.with_name(path.name.replace(split, "train")).write_text('{"no": "question"}\n')
    expected = {"piqa": 1, "arc_easy": 1, "arc_challenge": 0, "hellaswag": 1}
    assert {task: items(task, tmp_path)[0].gold for task in expected} == expected


def test_two_exports_of_one_split_are_refused(tmp_path):
    (tmp_path / "piqa").mkdir()
    for number in (0, 1):
        (tmp_path / "piqa" / f"validation-0000{number}-of-00002.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="may both be meant"):
        items("piqa", tmp_path)


def test_a_missing_task_names_both_files_that_would_do(tmp_path):
    message = r"no dev.jsonl .*, and no \*validation\*.jsonl in .*winogrande"
    with pytest.raises(ValueError, match=message):
        items("winogrande", tmp_path)


def test_piqa_without_labels_names_the_file_that_has_them(tmp_path):
    path = write(tmp_path, "piqa", [ROWS["piqa"] | {"label": 0}, ROWS["piqa"]])
    (path.parent / "valid-labels.lst").unlink()
    with pytest.raises(ValueError, match=r"no valid-labels\.lst"):
        items("piqa", tmp_path)


@pytest.mark.parametrize("key", ["answer", "label"])
@pytest.mark.parametrize("no, yes", [(False, True), ("false", "true"), (0, 1)])
def test_boolqs_answer_may_be_written_in_several_ways(key, no, yes):
    row = {"passage": "p", "question": "q"}
    assert [TASKS["boolq"].item(row | {key: answer}).gold for answer in (no, yes)] == [0, 1]


QUESTIONS = [Item(["c"] * 2, [" ab", " abcd"], [2, 4], 0),
             Item(["c"] * 2, [" ab", " abcd"], [2, 4], 1),
             Item(["c"] * 3, [" x", " y", " z"], [1, 1, 1], 1)]
SCORES = torch.tensor([-3.0, -4.0, -3.0, -4.0, -1.0, -1.0, -5.0])  # of all seven choices


def test_accuracy_and_normed_accuracy_by_hand():
    """Per character the first two questions' scores are -1.5 and -1; the third has a tie."""
    acc, acc_norm = accuracies(QUESTIONS, SCORES)
    assert acc.tolist() == [1, 0, 0] and acc_norm.tolist() == [0, 1, 0]


def test_the_loss_of_the_right_choice_is_per_token():
    losses = right_losses(QUESTIONS, SCORES, [1, 2, 3, 4, 5, 6, 7])
    assert losses.tolist() == pytest.approx([3 / 1, 4 / 4, 1 / 6])


class Spaces:
    """A tokenizer that joins a space to the word after it, and knows nothing else."""
    bos_id = 7

    def __init__(self, add_bos=True):
        self.add_bos = add_bos

    def pieces(self, text):
        return [sum(map(ord, piece)) for piece in re.findall(r" ?\S+| +", text)]

    def encode(self, text):
        return [7] * self.add_bos + self.pieces(text)


@pytest.mark.parametrize("add_bos, bos, front", [
    (True, "own", [7]), (True, "never", []), (False, "own", []), (False, "never", [])])
def test_context_and_continuation_are_split_as_in_the_harness(add_bos, bos, front):
    """BOS is the context's, and a space at its end goes with what follows."""
    tokenizer = Spaces(add_bos)
    expected = front + tokenizer.pieces("a b"), tokenizer.pieces(" c d")
    assert encode_pair(tokenizer, "a b", " c d", bos) == expected
    assert encode_pair(tokenizer, "a b ", "c d", bos) == expected


@pytest.mark.parametrize("bos", ["own", "never"])
def test_an_empty_context_is_bos(bos):
    assert encode_pair(Spaces(), "", " c", bos) == ([7], Spaces().pieces(" c"))


def test_the_header_says_which_bos_was_used_and_scores_follow_it(tmp_path, cli):
    write(tmp_path, "openbookqa", [ROWS["openbookqa"]] * 2)
    folder = tiny.checkpoint(tmp_path / "tiny")

    def run(*options):
        """Return the first line, and the loss in the last."""
        code, out, err = cli(zeroshot.main, "--ckpt", folder, "--tasks", "openbookqa",
                             "--data", tmp_path, *options)
        assert (code, err) == (0, "")
        return out.splitlines()[0], out.splitlines()[-1].split("|")[7]
    (header, default), own, (never, without) = run(), run("--bos", "own"), run("--bos", "never")
    assert "BOS in front for tiny (--bos own)" in header and (header, default) == own
    assert "no BOS in front (--bos never)" in never and without != default


def plain_loop(folder, pairs, longest):
    """Score one pair at a time with transformers."""
    from transformers import AutoModelForCausalLM
    net, scores = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for context, continuation in pairs:
        text = (context + continuation)[-longest - 1:]
        with torch.inference_mode():
            log_p = net(torch.tensor([text[:-1]])).logits[0].log_softmax(-1)
        first = len(text) - min(len(continuation), len(text) - 1)
        scores.append(sum(float(log_p[k - 1, text[k]]) for k in range(first, len(text))))
    return torch.tensor(scores)


def test_log_likelihoods_equal_a_plain_loop(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(zeroshot, "CHUNK", 200)  # several parts
    folder, rng = tiny.checkpoint(tmp_path / "tiny", max_position_embeddings=24), random.Random(0)
    pairs = [tuple(rng.choices(range(300), k=rng.randint(1, 29)) for _ in range(2))
             for _ in range(25)]
    scores = log_likelihoods(Checkpoint(folder), pairs, "cpu", torch.float32)
    assert torch.allclose(scores, plain_loop(folder, pairs, 24), atol=1e-4)


def test_no_pairs_have_no_log_likelihoods(ckpt):
    assert log_likelihoods(Checkpoint(ckpt), [], "cpu", torch.float32).shape == (0,)


REAL = tiny.DATA / "zeroshot"


@pytest.mark.skipif(not REAL.exists(), reason="needs the published files")
@pytest.mark.parametrize("model", ["stories260K", "wiki24"])
@pytest.mark.parametrize("task", TASKS)
def test_log_likelihoods_of_real_questions_equal_a_plain_loop(model, task):
    pytest.importorskip("transformers")
    folder, asked = tiny.DATA / "models" / model, items(task, REAL)
    tokenizer, source, pairs = load_tokenizer(folder), Checkpoint(folder), []
    for number, item in enumerate(asked[::len(asked) // 50]):
        k = number % len(item.contexts)  # another choice each time
        pairs.append(encode_pair(tokenizer, item.contexts[k], item.continuations[k]))
    assert len(pairs) >= 50
    scores = log_likelihoods(source, pairs, "cpu", torch.float32)
    expected = plain_loop(folder, pairs, source.config.max_position_embeddings)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.skipif(not REAL.exists(), reason="needs the published files")
@pytest.mark.parametrize("task, count", [
    ("piqa", 1838), ("winogrande", 1267), ("hellaswag", 10042), ("arc_easy", 2376),
    ("arc_challenge", 1172), ("openbookqa", 500), ("boolq", 3270)])
def test_every_question_of_the_published_files_is_read(task, count):
    assert len(items(task, REAL)) == count


def cells(line):
    """Return the cells of a row: name, task, questions, acc, acc_norm, quoted metric, loss."""
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_a_random_model_scores_at_chance(tmp_path, ckpt, cli):
    rng, words = random.Random(1), tiny.text().split()

    def phrase():
        return " ".join(rng.choices(words, k=4))
    write(tmp_path, "piqa", [{"goal": phrase(), "sol1": phrase(), "sol2": phrase()}
                             for _ in range(300)])
    code, out, err = cli(zeroshot.main, "--ckpt", ckpt, "--tasks", "piqa", "--data", tmp_path)
    assert (code, err) == (0, "")
    _, _, _, acc, acc_norm, _, loss = cells(out.splitlines()[-1])
    for mean, error in (acc.split(" ± "), acc_norm.split(" ± ")):
        assert float(error) == pytest.approx(100 * 0.5 / math.sqrt(299), rel=0.02)
        assert abs(float(mean) - 50) < 3 * float(error)
    assert float(loss.split(" ± ")[0]) > math.log(300)  # worse than a uniform guess


def test_the_average_of_five_names_its_metrics(tmp_path, ckpt, cli):
    for task in ("piqa", "winogrande", "hellaswag", "arc_easy"):
        write(tmp_path, task, [ROWS[task]] * 3)
    arc = tmp_path / "arc"
    (arc / "ARC-Challenge-Test.jsonl").write_text((arc / FILES["arc_easy"]).read_text())
    names = "piqa,winogrande,hellaswag,arc_easy,arc_challenge"
    code, out, err = cli(zeroshot.main, "--ckpt", ckpt, "--tasks", names, "--data", tmp_path,
                         "--limit", 2)
    header, *_, average = out.splitlines()
    assert (code, err) == (0, "") and "SUBSET: the first 2 questions" in header
    assert "average of five" in average and "acc_norm, WinoGrande acc" in average
    quoted = []
    for line in out.splitlines()[3:8]:
        _, task, _, acc, acc_norm, _, _ = cells(line)
        quoted.append(float((acc if task == "winogrande" else acc_norm).split(" ± ")[0]))
    assert f"{sum(quoted) / 5:.2f}" in average


@pytest.mark.parametrize("options, message", [
    (["--tasks", "piqa,nonsense"], "unknown 'nonsense'"),
    (["--tasks", "piqa"], "it comes from https://yonatanbisk.com"),
    (["--tasks", "boolq", "--limit", "0"], "--limit must be at least 1"),
    (["--limit", "3"], "required: --tasks"),
    (["--tasks", "boolq", "--bos", "always"], "invalid choice")])
def test_mistakes_are_one_line(options, message, tmp_path, ckpt, cli):
    code, _, err = cli(zeroshot.main, "--ckpt", ckpt, "--data", tmp_path, *options)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("task", ROWS)
def test_a_malformed_question_is_named_by_file_and_line(task, tmp_path):
    halves = {key: value + "\ud800" if isinstance(value, str) else value
              for key, value in ROWS[task].items()}
    blank = [ROWS[task] | {key: " "} for key in ("goal", "sol1", "option2", "question_stem",
                                                 "passage", "question") if key in ROWS[task]]
    for broken in ([], {}, dict.fromkeys(ROWS[task]), {key: [1] for key in ROWS[task]}, halves,
                   *blank):
        path = write(tmp_path, task, [ROWS[task], broken])
        with pytest.raises(ValueError, match=f"{path.name} line 2 is not a {task} question"):
            items(task, tmp_path)


def test_lines_are_counted_as_in_the_file_and_choices_are_told_apart(tmp_path):
    path = write(tmp_path, "arc_easy", [])
    for labels in (["A"], ["A", "A"]):
        choices = {"text": ["ice", "fire"][:len(labels)], "label": labels}
        row = json.dumps({"question": "Hot is", "choices": choices, "answerKey": "A"})
        path.write_text(f"\n{json.dumps(ROWS['arc_easy'])}\n\n{row}\n")
        with pytest.raises(ValueError, match="line 4 is not a"):
            items("arc_easy", tmp_path)
