"""Multiple choice: the harness's wording and splitting, log-likelihoods against transformers, accuracies by hand."""
import json
import math

import pytest
import tiny
import torch

import evaluate
from checkpoint.reader import Checkpoint
from compare import zeroshot
from compare.tasks import TASKS, Item, items
from compare.zeroshot import accuracies, encode_pair, log_likelihoods, right_losses
from text.tokenizer import load_tokenizer

ROWS = {  # one made-up question a task, in its published form; and what the harness would ask
    "piqa": ({"goal": "Dry a cup", "sol1": "Use a towel.", "sol2": "Use a lake."},
             ["Question: Dry a cup\nAnswer:"] * 2, [" Use a towel.", " Use a lake."]),
    "winogrande": ({"sentence": "Ann thanked Eve because _ had helped. ", "option1": "Ann", "option2": "Eve", "answer": "2"},
                   ["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"], [" had helped."] * 2),
    "hellaswag": ({"activity_label": "Cleaning", "ctx_a": "[header] How to clean [title] Take a cloth.",
                   "ctx_b": "then the cat", "ctx": "", "endings": ["walks  off. [step] Done.", "sings."], "label": "1"},
                  ["Cleaning: How to clean. Take a cloth. Then the cat"] * 2, [" walks off. Done.", " sings."]),
    "arc_easy": ({"question": {"stem": "What is hot?", "choices": [{"text": "ice", "label": "1"},
                                                                   {"text": "fire", "label": "2"}]},
                  "answerKey": "2"}, ["Question: What is hot?\nAnswer:"] * 2, [" ice", " fire"]),
    "openbookqa": ({"question_stem": "Hot is", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
                   ["Hot is"] * 2, [" ice", " fire"]),
    "boolq": ({"passage": "Fire is hot.", "question": "is fire hot", "answer": True},
              ["Fire is hot.\nQuestion: is fire hot?\nAnswer:"] * 2, [" no", " yes"]),
}
FILES = {"piqa": "valid.jsonl", "winogrande": "dev.jsonl", "hellaswag": "hellaswag_val.jsonl",
         "arc_easy": "ARC-Easy-Test.jsonl", "openbookqa": "test.jsonl", "boolq": "dev.jsonl"}


def write(folder, task, rows):
    path = folder / task.split("_")[0] / FILES[task]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if task == "piqa":
        (path.parent / "valid-labels.lst").write_text("1\n" * len(rows))
    return path


@pytest.mark.parametrize("task", ROWS)
def test_questions_are_worded_as_in_the_harness(task, tmp_path):
    row, contexts, continuations = ROWS[task]
    write(tmp_path, task, [row])
    item, = items(task, tmp_path)
    assert (item.contexts, item.continuations, item.gold) == (contexts, continuations, 1)
    if task != "winogrande":
        assert item.lengths == [len(text) - 1 for text in continuations]


def test_openbookqa_in_its_own_nested_form_and_arc_challenge():
    nested = {"question": {"stem": "Hot is", "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]},
              "answerKey": "B"}
    assert TASKS["openbookqa"].item(nested) == TASKS["openbookqa"].item(ROWS["openbookqa"][0])
    assert TASKS["arc_challenge"].item(ROWS["arc_easy"][0]) == TASKS["arc_easy"].item(ROWS["arc_easy"][0])


def test_arc_as_dataset_hubs_export_it():
    row = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}
    for task in ("arc_easy", "arc_challenge"):
        expected = TASKS[task].item(ROWS["arc_easy"][0])
        assert TASKS[task].item(row) == expected
        assert TASKS[task].item(row | {"choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
                                ) == expected
        assert TASKS[task].item(row | {"choices": {"text": ["ice", "fire"], "label": [1, 2]}, "answerKey": 2}) == expected


def test_exported_files_are_found_by_task_and_split(tmp_path):
    names = {"piqa": "piqa/validation.jsonl", "arc_easy": "ARC-Easy/test-00000-of-00001.jsonl",
             "arc_challenge": "ARC-Challenge/test-00000-of-00001.jsonl", "hellaswag": "hellaswag_validation.jsonl"}
    exports = {task: ROWS[task][0] for task in ("piqa", "arc_easy", "hellaswag")}
    exports["piqa"] = exports["piqa"] | {"label": 1}
    exports["arc_challenge"] = exports["arc_easy"] | {"answerKey": "1"}
    for task, name in names.items():
        for path in (tmp_path / name, tmp_path / name.replace("test", "train").replace("validation", "train")):
            path.parent.mkdir(exist_ok=True)
            row = exports[task] if path == tmp_path / name else {"none": "of them"}
            path.write_text(json.dumps(row) + "\n")
    found = {task: items(task, tmp_path)[0].gold for task in names}
    assert found == {"piqa": 1, "arc_easy": 1, "arc_challenge": 0, "hellaswag": 1}
    (tmp_path / "piqa" / "validation-00001-of-00002.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="may both be meant"):
        items("piqa", tmp_path)
    with pytest.raises(ValueError, match=r"no dev.jsonl .*, and no \*validation\*.jsonl in .*winogrande"):
        items("winogrande", tmp_path)


def test_piqa_without_labels_names_the_file_that_has_them(tmp_path):
    path = write(tmp_path, "piqa", [ROWS["piqa"][0] | {"label": 0}, ROWS["piqa"][0]])
    (path.parent / "valid-labels.lst").unlink()
    with pytest.raises(ValueError, match=r"no valid-labels\.lst"):
        items("piqa", tmp_path)


def test_boolqs_answer_may_be_written_in_several_ways():
    row = {"passage": "p", "question": "q"}
    for no, yes in ((False, True), ("false", "true"), (0, 1)):
        assert TASKS["boolq"].item(row | {"label": no}).gold == 0 and TASKS["boolq"].item(row | {"answer": yes}).gold == 1


def test_accuracy_and_normed_accuracy_by_hand():
    questions = [Item(["c"] * 2, [" ab", " abcd"], [2, 4], 0), Item(["c"] * 2, [" ab", " abcd"], [2, 4], 1),
                 Item(["c"] * 3, [" x", " y", " z"], [1, 1, 1], 1)]
    scores = torch.tensor([-3.0, -4.0,  -3.0, -4.0,  -1.0, -1.0, -5.0])  # per character -1.5 and -1; a tie goes to the first
    plain, normed = accuracies(questions, scores)
    assert right_losses(questions, scores, [1, 2, 3, 4, 5, 6, 7]).tolist() == pytest.approx([3.0, 1.0, 1 / 6])
    assert plain.tolist() == [1, 0, 0] and normed.tolist() == [0, 1, 0]


class Spaces:
    """A tokenizer that joins a space to the word after it, and remembers nothing else."""
    bos_id, add_bos = 7, True

    def encode(self, text):
        import re
        return [7, *(sum(map(ord, piece)) for piece in re.findall(r" ?\S+| +", text))]


def test_context_and_continuation_are_split_as_in_the_harness():
    ids = Spaces().encode
    assert encode_pair(Spaces(), "a b", " c d") == (ids("a b"), ids(" c d")[1:])  # BOS is the context's
    assert encode_pair(Spaces(), "a b ", "c d") == (ids("a b"), ids(" c d")[1:])  # the space goes with what follows
    assert encode_pair(Spaces(), "a b", " c d", "never") == (ids("a b")[1:], ids(" c d")[1:])
    for bos in ("own", "never"):
        assert encode_pair(Spaces(), "", " c", bos) == ([7], ids(" c")[1:])


def test_a_tokenizer_that_adds_no_bos_gets_none():
    plain = Spaces()
    plain.add_bos, plain.encode = False, lambda text: Spaces.encode(plain, text)[1:]
    for bos in ("own", "never"):
        assert encode_pair(plain, "a b", " c", bos) == (plain.encode("a b"), plain.encode(" c"))


def test_the_header_says_which_bos_was_used_and_scores_follow_it(tmp_path, cli):
    write(tmp_path, "openbookqa", [ROWS["openbookqa"][0]] * 2)
    folder = tiny.checkpoint(tmp_path / "tiny")
    losses = {}
    for bos, said in (("own", "BOS in front for tiny (--bos own)"), ("never", "no BOS in front (--bos never)"),
                      (None, "BOS in front for tiny (--bos own)")):
        code, out, err = cli(zeroshot.main, "--ckpt", folder, "--tasks", "openbookqa", "--data", tmp_path,
                             *(["--bos", bos] if bos else []))
        assert (code, err) == (0, "") and said in out.splitlines()[0]
        losses[bos] = out.splitlines()[-1].split("|")[7]
    assert losses[None] == losses["own"] != losses["never"]


def plain_loop(folder, pairs, longest):
    """One request at a time through transformers."""
    from transformers import AutoModelForCausalLM
    net, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for context, continuation in pairs:
        text = (context + continuation)[-longest - 1:]
        with torch.inference_mode():
            logits = net(torch.tensor([text[:-1]])).logits[0].log_softmax(-1)
        n = min(len(continuation), len(text) - 1)
        found.append(sum(float(logits[len(text) - 1 - n + k, text[len(text) - n + k]]) for k in range(n)))
    return torch.tensor(found)


def test_log_likelihoods_equal_a_plain_loop(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(zeroshot, "CHUNK", 200)  # several parts
    folder = tiny.checkpoint(tmp_path / "tiny", max_position_embeddings=24)
    g = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randint(300, (int(n),), generator=g).tolist() for n in torch.randint(1, 30, (2,), generator=g))
             for _ in range(25)]
    found = log_likelihoods(Checkpoint(folder), pairs, "cpu", torch.float32)
    assert torch.allclose(found, plain_loop(folder, pairs, 24), atol=1e-4)
    assert log_likelihoods(Checkpoint(folder), [], "cpu", torch.float32).shape == (0,)


REAL = tiny.DATA / "zeroshot"


@pytest.mark.skipif(not REAL.exists(), reason="needs the published files")
@pytest.mark.parametrize("model", ["stories260K", "wiki24"])
@pytest.mark.parametrize("task", TASKS)
def test_log_likelihoods_of_real_questions_equal_a_plain_loop(model, task):
    pytest.importorskip("transformers")
    folder, asked = tiny.DATA / "models" / model, items(task, REAL)
    step = len(asked) // 50
    tokenizer, source = load_tokenizer(folder), Checkpoint(folder)
    chosen = [(item, k % len(item.contexts)) for k, item in enumerate(asked[::step])]
    pairs = [encode_pair(tokenizer, item.contexts[k], item.continuations[k]) for item, k in chosen]
    found = log_likelihoods(source, pairs, "cpu", torch.float32)
    assert len(pairs) >= 50
    assert torch.allclose(found, plain_loop(folder, pairs, source.config.max_position_embeddings), rtol=1e-5, atol=2e-4)


@pytest.mark.skipif(not REAL.exists(), reason="needs the published files")
@pytest.mark.parametrize("task, count", [("piqa", 1838), ("winogrande", 1267), ("hellaswag", 10042), ("arc_easy", 2376),
                                         ("arc_challenge", 1172), ("openbookqa", 500), ("boolq", 3270)])
def test_every_question_of_the_published_files_is_read(task, count):
    assert len(items(task, REAL)) == count


def test_a_random_model_scores_at_chance(tmp_path, cli):
    rng = torch.Generator().manual_seed(1)
    words = tiny.text().split()

    def phrase():
        return " ".join(words[int(i)] for i in torch.randint(len(words), (4,), generator=rng))
    write(tmp_path, "piqa", [{"goal": phrase(), "sol1": phrase(), "sol2": phrase()} for _ in range(300)])
    code, out, err = cli(zeroshot.main, "--ckpt", tiny.checkpoint(tmp_path / "tiny"), "--tasks", "piqa", "--data", tmp_path)
    assert (code, err) == (0, "")
    cells = [cell.split("±") for cell in out.splitlines()[-1].split("|")[4:6]]
    for mean, error in cells:
        assert float(error) == pytest.approx(100 * 0.5 / math.sqrt(299), rel=0.02)
        assert abs(float(mean) - 50) < 3 * float(error)
    assert float(out.splitlines()[-1].split("|")[7].split("±")[0]) > math.log(300)  # worse than a uniform guess


def test_the_average_of_five_names_its_metrics(tmp_path, cli):
    for task in ("piqa", "winogrande", "hellaswag", "arc_easy"):
        write(tmp_path, task, [ROWS[task][0]] * 3)
    (tmp_path / "arc" / "ARC-Challenge-Test.jsonl").write_text((tmp_path / "arc" / FILES["arc_easy"]).read_text())
    folder = tiny.checkpoint(tmp_path / "tiny")
    names = "piqa,winogrande,hellaswag,arc_easy,arc_challenge"
    code, out, err = cli(zeroshot.main, "--ckpt", folder, "--tasks", names, "--data", tmp_path, "--limit", 2)
    assert (code, err) == (0, "") and "average of five" in out and "SUBSET: the first 2 questions" in out
    quoted = [float(line.split("|")[{"acc": 4, "acc_norm": 5}[line.split("|")[6].strip()]].split("±")[0])
              for line in out.splitlines()[3:8]]
    assert f"{sum(quoted) / 5:.2f}" in out.splitlines()[-1]


@pytest.mark.parametrize("options, message", [
    (["--tasks", "piqa,nonsense"], "unknown 'nonsense'"), (["--tasks", "piqa"], "it comes from https://yonatanbisk.com"),
    (["--tasks", "boolq", "--limit", "0"], "--limit must be at least 1"), (["--limit", "3"], "required: --tasks"),
    (["--tasks", "boolq", "--bos", "always"], "invalid choice")])
def test_mistakes_are_one_line(options, message, tmp_path, ckpt, cli):
    code, _, err = cli(zeroshot.main, "--ckpt", ckpt, "--data", tmp_path, *options)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("task", ROWS)
def test_a_malformed_question_is_named_by_file_and_line(task, tmp_path):
    for broken in ({}, dict.fromkeys(ROWS[task][0]), {key: [1] for key in ROWS[task][0]}):
        path = write(tmp_path, task, [ROWS[task][0], broken])
        with pytest.raises(ValueError, match=f"{path.name} line 2 is not a {task} question"):
            items(task, tmp_path)


def test_evaluate_names_the_command_to_which_tasks_moved(ckpt, tmp_path, cli):
    code, _, err = cli(evaluate.main, "--ckpt", ckpt, "--tasks", "piqa", "--data", tmp_path)
    assert code == 2 and "python -m compare.zeroshot" in err and err.count("\n") == 1
