"""Recovery: its losses, LoRA, and runs that can be repeated, killed and resumed."""
import json
import math
import weakref
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import beyond.recover
import beyond.training
import compare.recovery
import flatten
from beyond.lessons import (
    LOSSES,
    PIECE,
    balanced,
    hidden_loss,
    in_pieces,
    label_loss,
    lesson,
    streams,
    teacher_loss,
)
from beyond.lora import LoRA, add_lora, merge_lora
from beyond.material import draw, read_lesson, split
from beyond.training import held_out_loss, rate
from checkpoint.reader import Checkpoint
from checkpoint.writer import Writer
from compare.harness import groups_left
from compare.network import Network
from compare.recovery import table as recovery_table
from compare.recovery import tokens_to
from model import Block, Transformer, load
from text import stdlib
from text.tokenizer import load_tokenizer

GROUPS = [[0], [1, 2], [3, 4]]


def network(blocks: int, seed: int = 0, first: int = 0) -> Transformer:
    """A float64 model whose block k has seed `first` + k."""
    cfg = tiny.config(num_hidden_layers=blocks)
    outer = tiny.random_tensors(cfg.outer_shapes(), 100 + seed)
    made = [Block(tiny.block(cfg, first + k), cfg) for k in range(blocks)]
    return Transformer(cfg, made, outer).requires_grad_(False)


def some_ids(n: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(300, (n, length), generator=torch.Generator().manual_seed(0))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def result_of(source: Path, out: Path, groups: list[list[int]]) -> Path:
    """A checkpoint with the first block of each group: the source with blocks left out."""
    teacher = Checkpoint(source)
    with Writer(out, teacher) as writer:
        for group in groups:
            writer.add(teacher.block(group[0]))
        writer.finish(groups, {"method": "dropped", "groups": [{"blocks": g} for g in groups]})
    return out


@pytest.fixture
def small(ckpt, tmp_path, text_file, cli):
    """Call recovery on a tiny result with its teacher; returns exit code, stdout, stderr."""
    student = result_of(ckpt, tmp_path / "small", GROUPS)

    def call(*options, out="recovered"):
        return cli(beyond.recover.main, "--ckpt", student, "--teacher", ckpt, "--data", text_file,
                   "--steps", 8, "--batch", 3, "--length", 16, "--out", tmp_path / out,
                   "--device", "cpu", "--no-eval", *options)
    return call


# ---- losses

@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-4), (torch.bfloat16, 1e-3)])
def test_the_teachers_loss_of_two_words_in_numbers(dtype, digits):
    """One token has KL((1/2, 1/2) || (1/4, 3/4)) = 0.1438, and of another both say the same."""
    q, p = torch.tensor([[[1.0, 3.0], [5.0, 5.0]], [[1.0, 1.0], [7.0, 7.0]]]).log().to(dtype)
    tiny.expect(f"two tokens, {dtype}; the student says 1/4 and 3/4 where the teacher says 1/2, "
                "and then the same as the teacher", torch.tensor([0.1438, 0]), teacher_loss(q, p),
                atol=digits, rtol=0)


def test_the_divergence_from_itself_is_zero_and_has_no_gradient():
    z = numbers(7, 50).requires_grad_()
    losses = teacher_loss(z, z.detach())
    losses.sum().backward()
    tiny.expect("the losses of a student that is its teacher", torch.zeros(7), losses.detach(),
                atol=1e-6, rtol=0)
    tiny.expect("its gradient", torch.zeros_like(z), z.grad, atol=1e-6, rtol=0)


def test_the_teachers_loss_is_cross_entropy_minus_the_teachers_entropy():
    z, t = numbers(7, 50), numbers(7, 50, seed=1)
    p = t.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    tiny.expect("the losses of 7 tokens, of 50 words",
                F.cross_entropy(z, p, reduction="none") - entropy, teacher_loss(z, t).double(),
                atol=1e-5, rtol=0)


def test_the_loss_of_labels_is_that_of_the_right_words():
    z = numbers(7, 50)
    assert torch.allclose(label_loss(z, torch.arange(7)).double(),
                          -z.log_softmax(-1).diagonal(), atol=1e-5)


def test_the_hidden_loss_is_relative_to_each_teachers_size():
    t = [numbers(6, 4), 1000 * numbers(6, 4, seed=1)]
    assert hidden_loss(t, t) == 0
    assert torch.allclose(hidden_loss([1.1 * t[0], 1.2 * t[1]], t),
                          torch.tensor((0.01 + 0.04) / 2), atol=1e-5)


def test_both_parts_of_a_balanced_loss_weigh_the_same():
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    loss = balanced(a, b)
    loss.backward()
    assert float(loss.detach()) == 4 and float(a.grad) == 1 and abs(float(b.grad) - 0.4) < 1e-6


def test_a_loss_in_pieces_is_the_loss_of_the_whole():
    n = PIECE + 300
    x, targets = numbers(n, 20).requires_grad_(), torch.arange(n) % 20
    whole = label_loss(x, targets)
    whole_gradient, = torch.autograd.grad(whole.sum(), x)
    pieces = in_pieces(label_loss, x, targets)
    gradient, = torch.autograd.grad(pieces.sum(), x)
    assert torch.allclose(pieces, whole) and torch.allclose(gradient, whole_gradient)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    net, ids = network(3), some_ids()
    for loss in ("kl", "hidden", "come"):
        student = network(3).requires_grad_(True)
        value = lesson(loss, student, net, [[0], [1], [2]] if loss == "kl" else [[0, 0], [1, 1],
                       [2, 2]], ids, torch.ones_like(ids, dtype=torch.bool), done=1.0)
        value.backward()
        largest = max(float(p.grad.abs().max()) for p in student.parameters())
        assert abs(float(value.detach())) < 1e-6 and largest < 1e-5, loss


def test_checkpointing_changes_no_loss_and_no_gradient():
    teacher, ids = network(5), some_ids()
    learned = torch.ones_like(ids, dtype=torch.bool)
    found = []
    for checkpointing in (False, True):
        student = network(3).requires_grad_(True)
        loss = lesson("hidden", student, teacher, GROUPS, ids, learned, 0.0, checkpointing)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in student.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_streams_end_in_the_models_own_states():
    net, ids = network(3), some_ids()
    ends = streams(net, net.model["embed_tokens"](ids))
    assert torch.equal(net.model["norm"](ends[-1]), net.hidden(ids))


def test_labels_are_the_next_tokens_and_only_those_to_be_learned():
    net, ids = network(2), some_ids()
    learned = torch.zeros_like(ids, dtype=torch.bool)
    learned[1, 4] = learned[2, 7] = True
    logits = net(ids)
    expected = F.cross_entropy(logits[[1, 2], [3, 6]], ids[[1, 2], [4, 7]])
    assert torch.allclose(lesson("labels", net, None, [], ids, learned).double(), expected,
                          atol=1e-5)


def test_comes_first_stage_trains_joined_blocks_on_the_teachers_stream():
    teacher, ids = network(5), some_ids()
    student = network(3, first=7).requires_grad_(True)
    learned = torch.ones_like(ids, dtype=torch.bool)
    lesson("come", student, teacher, GROUPS, ids, learned, done=0.4).backward()
    layers = student.model["layers"]
    assert all(p.grad is None for p in layers[0].parameters())
    assert all(p.grad is not None for k in (1, 2) for p in layers[k].parameters())
    # the second block learns from the teacher's stream, so the first joined one does not matter
    gradient = layers[2].mlp.down_proj.weight.grad.clone()
    other = network(3, first=7).requires_grad_(True)
    with torch.no_grad():
        other.model["layers"][1].mlp.down_proj.weight.zero_()
    lesson("come", other, teacher, GROUPS, ids, learned, done=0.4).backward()
    assert torch.equal(other.model["layers"][2].mlp.down_proj.weight.grad, gradient)
    second = lesson("come", student, teacher, GROUPS, ids, learned, done=0.5)
    assert torch.equal(second, lesson("kl", student, teacher, GROUPS, ids, learned))


# ---- LoRA

def test_lora_changes_nothing_at_first_and_merging_changes_nothing_at_last():
    net, ids = network(3), some_ids()
    before = net(ids)
    add_lora(net, seed=0)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 7 * 2 and torch.equal(net(ids), before)
    for k, p in enumerate(trained.values()):
        p.data = numbers(*p.shape, seed=k) / 10
    unmerged = net(ids)
    shapes = {name: tensor.shape for name, tensor in network(3).state_dict().items()}
    merge_lora(net)
    assert {name: tensor.shape for name, tensor in net.state_dict().items()} == shapes
    assert not torch.allclose(unmerged, before, atol=1e-3)
    assert torch.allclose(net(ids), unmerged, atol=1e-10)


def test_lora_adds_a_scaled_product():
    layer = torch.nn.Linear(6, 4)
    lora = LoRA(layer, torch.Generator().manual_seed(0), rank=2, alpha=6)
    lora.B.data.normal_()
    x = torch.randn(5, 6)
    assert torch.allclose(lora(x), layer(x) + 3 * x @ lora.A.T @ lora.B.T, atol=1e-5)


# ---- text

def test_of_an_instruction_only_the_answer_is_learned(ckpt, tmp_path):
    rows = [{"instruction": f"say {k}", "input": "abc" if k % 2 else None, "output": "gh"}
            for k in range(40)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    tokenizer = load_tokenizer(ckpt)
    texts, name = read_lesson(path, tokenizer, (2,), 200)
    assert name == "rows.json" and len(texts) == 40
    learning, judging = split(texts)
    assert len(learning) == 38 and len(judging) == 2
    ids, learned = draw([learning], 5, 200, seed=0)
    for row, marks in zip(ids, learned, strict=True):
        answer = row[marks]
        assert answer[-1] == 2 and tokenizer.decode(answer.tolist()).strip() == "gh"
        question = tokenizer.decode(row[:int(marks.int().argmax())].tolist())
        assert question.startswith("### Instruction: say ") and question.endswith("Response:")


def test_texts_take_turns_and_a_seed_decides_all():
    texts = [torch.zeros(50, dtype=torch.long), torch.ones(50, dtype=torch.long)]
    ids, learned = draw(texts, 6, 8, seed=1)
    assert ids[:, 0].sum() == 3 and ids.shape == (6, 8) and learned.all()
    text = torch.arange(100)
    assert torch.equal(draw([text], 4, 8, 5)[0], draw([text], 4, 8, 5)[0])
    assert not torch.equal(draw([text], 4, 8, 5)[0], draw([text], 4, 8, 6)[0])
    assert int(split(text)[0].max()) == 94


@pytest.mark.parametrize("content, words", [
    ("[]", "0 instructions"), ('{"a": 1}', "JSON list"), ("[1, 2]", "JSON list"),
    ('[{"instruction": "a", "output": 3}]', "JSON list"), ("{", "JSON list"),
    ('[{"instruction": 3, "output": "a"}]', "JSON list"), ("[" * 9999, "JSON list"),
    ('[{"instruction": "a", "input": 3, "output": "b"}]', "JSON list"),
    ('[{"instruction": "\\ud800", "output": "b"}]', "JSON list"),
    ('[{"output": "x"}]', "KeyError: 'instruction'"),
    ('[{"instruction": "a", "output": "b"}, {}]', "({}: KeyError"),
    ('[{"instruction": "a", "output": "b"}]', "0 instructions whose questions are shorter")])
def test_a_json_file_of_another_form_is_refused(content, words, small, tmp_path):
    for name in ("x.json", "X.JSON", "x.jsonl"):
        (tmp_path / name).write_text(content)
        code, _, err = small("--data", tmp_path / name)
        assert code == 2 and words in err and err.count("\n") == 1


# ---- runs

def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("part", [[], ["--full"], ["--last", "1"]], ids=["lora", "full", "last"])
def test_every_loss_and_part_gives_an_ordinary_checkpoint(small, tmp_path, loss, part):
    code, _, err = small("--loss", loss, *part)
    assert code == 0, err
    before, after = load_file(tmp_path / "small" / "model.safetensors"), load_file(
        tmp_path / "recovered" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    if not part:
        assert changed and all("_proj.weight" in name for name in changed)
    elif part == ["--last", "1"] and loss != "come":
        assert changed and all(name.startswith(("model.layers.2.", "model.norm", "lm_head"))
                               for name in changed)
    record = json.loads((tmp_path / "recovered" / "flatten.json").read_text())
    recovery, = record["recovery"]
    assert recovery["tokens"] == 8 * 3 * 16 and recovery["loss"] == loss
    assert record["groups"] == [{"blocks": group} for group in GROUPS]
    assert record["parameters_before"] == Checkpoint(tmp_path / "tiny").size()[0]
    assert not (tmp_path / "recovered.unfinished").exists()


def test_a_run_lowers_the_held_out_loss_of_the_bundled_model(tmp_path, cli):
    bundled = flatten.BUNDLED
    groups = [[i] for i in range(6)] + [list(range(6, 18))] + [[i] for i in range(18, 24)]
    student = result_of(bundled, tmp_path / "small", groups)
    (tmp_path / "python.txt").write_text(stdlib.text(evaluation=False, characters=100_000))
    code, _, err = cli(beyond.recover.main, "--ckpt", student, "--teacher", bundled, "--data",
                       tmp_path / "python.txt", "--steps", 6, "--batch", 4, "--length", 64,
                       "--rate", "3e-3", "--out", tmp_path / "new", "--no-eval")
    assert code == 0, err
    recovery = json.loads((tmp_path / "new" / "flatten.json").read_text())["recovery"][0]
    first, last = recovery["held_out"][0], recovery["held_out"][-1]
    assert first[0] == 0 and last[0] == 6 * 4 * 64 and last[1] < first[1] - 0.01


def killed(monkeypatch, step: int, small, save_every: float = -1.0) -> tuple[int, str, str]:
    """Interrupt a run in this step. By default all steps before it are saved, from here on."""
    monkeypatch.setattr(beyond.training, "SAVE_EVERY", save_every)
    update, calls = torch.optim.AdamW.step, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return update(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dying)
        return small(out="killed")


@pytest.mark.parametrize("loss", ["hidden", "come"])
def test_a_seed_decides_the_bytes_and_a_killed_run_ends_with_the_same(small, tmp_path,
                                                                        monkeypatch, loss):
    def small(*options, out, call=small):
        return call("--loss", loss, *options, out=out)
    assert small(out="one")[0] == small(out="two")[0] == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert small("--seed", 1, out="other")[0] == 0
    assert weights(tmp_path / "other") != weights(tmp_path / "one")
    code, _, err = killed(monkeypatch, 3, small)
    assert code == 2 and err.endswith("error: interrupted\n")
    assert "killed.unfinished has the run up to its last save; --resume goes on there" in err
    assert not (tmp_path / "killed").exists() and (tmp_path / "killed.unfinished").is_file()
    code, _, err = small(out="killed")
    assert code == 2 and "--resume" in err
    for option, value in (("rate", "0.1"), ("dtype", "bfloat16"), ("steps", "9")):
        code, _, err = small("--resume", f"--{option}", value, out="killed")
        assert code == 2 and f"another {option}" in err
    assert small("--resume", out="killed")[0] == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "one")
    assert not (tmp_path / "killed.unfinished").exists()
    recovery = json.loads((tmp_path / "killed" / "flatten.json").read_text())["recovery"][0]
    assert recovery["steps"] == 8 and len(recovery["held_out"]) == 9


def test_the_first_step_is_saved_at_once_and_the_next_ones_later(small, tmp_path, monkeypatch):
    killed(monkeypatch, 5, small, save_every=300.0)
    with safe_open(tmp_path / "killed.unfinished", "pt") as file:
        assert json.loads(file.metadata()["facts"])["steps"] == 1


@pytest.mark.parametrize("part", [[], ["--full"]])
def test_bfloat16_keeps_the_digits_that_are_stored(small, tmp_path, part):
    """A tiny step moves no weight by as much as rounding it to bfloat16 would."""
    assert small("--dtype", "bfloat16", "--steps", 1, "--rate", "1e-9", *part)[0] == 0
    before, after = (load_file(tmp_path / name / "model.safetensors")
                     for name in ("small", "recovered"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-6)


def test_bfloat16_learns_and_leaves_alone_what_it_does_not_train(small, tmp_path):
    code, _, err = small("--dtype", "bfloat16", "--last", 1, "--rate", "1e-2")
    assert code == 0, err
    recovery = json.loads((tmp_path / "recovered" / "flatten.json").read_text())["recovery"][0]
    losses = [loss for _, loss in recovery["held_out"]]
    assert len(set(losses)) > 4 and losses[-1] < losses[0]  # no stale copy of the weights
    before, after = (load_file(tmp_path / name / "model.safetensors")
                     for name in ("small", "recovered"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name], after[name]) and before[name].dtype == torch.float32
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.parametrize("part", [["--last", 1], ["--full"], []], ids=["last", "full", "lora"])
def test_tied_models_and_head_norms_are_trained_and_open(tmp_path, text_file, cli, part):
    dense = tiny.checkpoint(tmp_path / "dense", model_type="qwen3", tie_word_embeddings=True,
                            architectures=["Qwen3ForCausalLM"])
    student = result_of(dense, tmp_path / "small", GROUPS)
    code, _, err = cli(beyond.recover.main, "--ckpt", student, "--teacher", dense, "--data",
                       text_file, "--steps", 3, "--batch", 2, "--length", 16, "--out",
                       tmp_path / "new", *part)
    assert code == 0, err
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "new"))
    assert {name: t.shape for name, t in before.items()} == {name: t.shape
                                                             for name, t in after.items()}
    table = "model.embed_tokens.weight"
    assert torch.equal(before[table], after[table]) == (not part)


def test_a_broken_state_is_one_line(small, tmp_path):
    (tmp_path / "killed.unfinished").write_bytes(b"not safetensors")
    code, _, err = small("--resume", out="killed")
    assert code == 2 and "cannot be read" in err and err.count("\n") == 1


def test_a_state_with_impossible_facts_is_refused_and_another_spelling_is_not(
        small, tmp_path, monkeypatch):
    killed(monkeypatch, 4, small)
    path = tmp_path / "killed.unfinished"
    good = path.read_bytes()
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(meta["facts"])
    for wrong in ([], {}, facts | {"steps": 99}, facts | {"steps": -3}, facts | {"dense": "x"},
                  facts | {"held_out": [3]}, facts | {"steps": 4.0}, facts | {"steps": True},
                  facts | {"held_out": []}, facts | {"held_out": "abc"}, facts | {"tokens": 0.5},
                  facts | {"seconds": math.inf}, facts | {"held_out": [["x", 2.0]]},
                  facts | {"held_out": [[1]]}, facts | {"held_out": [[0, 1, 2]]},
                  facts | {"tokens": -5}, facts | {"seconds": -9.0}):
        save_file(tensors, path, meta | {"facts": json.dumps(wrong)})
        code, _, err = small("--resume", out="killed")
        assert code == 2 and "cannot be read" in err and err.count("\n") == 1
    name, tensor = next((name, t) for name, t in tensors.items() if t.dim() == 2)
    for wrong in (tensor * math.nan, tensor[:, :1].clone()):
        save_file(tensors | {name: wrong}, path, meta)
        code, _, err = small("--resume", out="killed")
        assert code == 2 and f"({name!r})" in err and err.count("\n") == 1
    path.write_bytes(good)
    code, _, err = small("--resume", "--ckpt", f"{tmp_path}/./small/", out="killed")
    assert code == 0, err


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(small, tmp_path, monkeypatch):
    monkeypatch.setattr(beyond.recover, "lesson", lambda *args, **more: torch.tensor(
        math.inf, requires_grad=True) * lesson(*args, **more))
    code, _, err = small()
    assert code == 2 and "the loss of step 0 is not finite" in err and err.count("\n") == 1
    assert not (tmp_path / "recovered").exists()


def test_a_second_run_into_one_output_is_refused_as_long_as_the_first_lives(small, tmp_path):
    """Also before the first has saved anything, and with --resume."""
    with beyond.training.alone(tmp_path / "recovered.unfinished", ""):
        for options in ((), ("--resume",)):
            code, _, err = small(*options)
            assert code == 2 and "another run is writing" in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "text.txt", "tiny"]
    assert small()[0] == 0


def test_a_result_that_cannot_be_written_is_not_trained_again(small, tmp_path, monkeypatch):
    assert small(out="one")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_flush", lambda self: (_ for _ in ()).throw(OSError("disk full")))
        code, _, err = small(out="two")
        assert code == 2 and "disk full" in err and not (tmp_path / "two").exists()
    monkeypatch.setattr(beyond.training, "rate", None)  # which every step calls
    code, _, err = small("--resume", out="two")
    assert code == 0 and weights(tmp_path / "two") == weights(tmp_path / "one"), err


def test_only_a_teacher_that_teaches_stays_in_memory(small, monkeypatch):
    loaded, alive, load, train = [], {}, beyond.recover.load, beyond.recover.train

    def loading(*args):
        loaded.append(weakref.ref(net := load(*args)))
        return net

    def training(*args):
        alive[loss] = [net() is not None for net in loaded]
        return train(*args)
    monkeypatch.setattr(beyond.recover, "load", loading)
    monkeypatch.setattr(beyond.recover, "train", training)
    for loss in ("labels", "kl"):
        loaded.clear()
        assert small("--loss", loss, out=loss)[0] == 0
    assert alive == {"labels": [False, True], "kl": [True, True]}  # teacher, student


def test_a_result_can_be_recovered_again(small, tmp_path, ckpt, text_file, cli):
    assert small()[0] == 0
    code, _, err = cli(beyond.recover.main, "--ckpt", tmp_path / "recovered", "--teacher", ckpt,
                       "--data", text_file, "--steps", 1, "--length", 16, "--out",
                       tmp_path / "again", "--no-eval")
    assert code == 0, err
    assert len(json.loads((tmp_path / "again" / "flatten.json").read_text())["recovery"]) == 2


def test_what_does_not_belong_together_is_refused(ckpt, tmp_path, cli, small, text_file):
    other = tiny.checkpoint(tmp_path / "other", seed=5)
    for student, teacher, words in ((tmp_path / "small", other, "was not made of"),
                                    (ckpt, ckpt, "has no flatten.json")):
        code, _, err = cli(beyond.recover.main, "--ckpt", student, "--teacher", teacher,
                           "--data", text_file, "--out", tmp_path / "new")
        assert code == 2 and words in err and err.count("\n") == 1
    path = tmp_path / "small" / "flatten.json"
    record = json.loads(path.read_text())
    same = [{"blocks": [i]} for i in range(3)]
    for change, words in (({"groups": []}, "does not say"), ({"groups": None}, "does not say"),
                          ({"groups": same}, "does not say"), ({"recovery": 3}, "does not say"),
                          ({"groups": [{"blocks": []}, *record["groups"]]}, "does not say"),
                          ({"parameters_before": "x"}, "does not say")):
        path.write_text(json.dumps(record | change))
        code, _, err = small()
        assert code == 2 and words in err and err.count("\n") == 1
    path.write_text(json.dumps({"groups": record["groups"]}))
    code, _, err = small()
    assert code == 2 and "earlier version" in err


def test_the_digest_tells_models_apart_by_any_tensor(tmp_path):
    first, second = (tiny.checkpoint(tmp_path / name) for name in "ab")
    digest = Checkpoint(first).digest()
    assert Checkpoint(second).digest() == digest
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))
    assert Checkpoint(second).digest() != digest
    (second / "config.json").write_text(json.dumps(config))
    for name in ("model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
        tiny.change_tensors(second, lambda tensors, name=name: tensors[name].add_(1e-3))
        assert Checkpoint(second).digest() != digest
        tiny.change_tensors(second, lambda tensors, name=name: tensors[name].copy_(
            load_file(first / "model.safetensors")[name]))
    assert Checkpoint(second).digest() == digest


def test_a_teacher_is_not_overwritten_and_wide_blocks_are_refused(ckpt, tmp_path, cli, small,
                                                                  text_file):
    code, _, err = small("--overwrite", out="tiny")
    assert code == 2 and "overlap" in err
    assert cli(flatten.main, "--ckpt", ckpt, "--data", text_file, "--samples", 4, "--length", 16,
               "--no-eval", "--keep-wide", "--out", tmp_path / "wide")[0] == 0
    code, _, err = cli(beyond.recover.main, "--ckpt", tmp_path / "wide", "--teacher", ckpt)
    assert code == 2 and "has wide blocks" in err


@pytest.mark.parametrize("options, words", [
    (["--full", "--last", "2"], "give one of them"),
    (["--steps", "0"], "must be at least 1"),
    (["--last", "9"], "between 0 and the model's 3 blocks"),
    (["--ckpt", "nowhere"], "nowhere"),
    (["--data", "nowhere.json"], "no such file"), (["--data", "/dev/zero"], "no such file"),
    (["--data", "self"], "give another text"),
    (["--batch", "100000000000"], "at most"), (["--steps", "1000000000000"], "at most"),
    (["--rate", "nan"], "--rate must be positive"),
    (["--length", "100000"], "fewer than twenty windows"),
    (["--rate", "1e38"], "--rate must be positive and at most 1"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistakes_are_one_line_and_leave_nothing(small, tmp_path, options, words):
    code, _, err = small(*options)
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "text.txt", "tiny"]


def test_an_existing_output_stays(small, tmp_path):
    (tmp_path / "recovered").mkdir()
    (tmp_path / "recovered" / "mine").write_text("")
    code, _, err = small("--overwrite")
    assert code == 2 and "not a result" in err and (tmp_path / "recovered" / "mine").exists()


def test_the_rate_rises_and_falls_to_a_tenth():
    rates = [rate(step, 400, 2.0) for step in range(400)]
    assert rates[0] == 0.1 and max(rates) == rates[20] == 2.0
    assert rates[20:] == sorted(rates[20:], reverse=True) and abs(rates[-1] - 0.2) < 1e-3


def test_the_held_out_loss_counts_every_token_once(ckpt):
    net = load(ckpt)
    ids, learned = draw([torch.randint(300, (5000,))], 300, 16, seed=0)
    learned[:7, :9] = False
    logits = net(ids)[:, :-1][learned[:, 1:]]
    expected = F.cross_entropy(logits, ids[:, 1:][learned[:, 1:]])
    assert abs(held_out_loss(net, (ids, learned), "cpu") - float(expected)) < 1e-5


def test_blocks_left_out_belong_to_the_block_before(ckpt):
    dense = Network.of(Checkpoint(ckpt))
    short = dense.with_blocks([dense.blocks[1], dense.blocks[4]])
    assert groups_left(short, dense) == [{"blocks": [0, 1, 2, 3]}, {"blocks": [4]}]
    assert groups_left(dense.with_blocks([dict(dense.blocks[0])]), dense) is None


# ---- the comparison

def test_tokens_to_a_loss_lie_on_a_straight_line_between_two_points():
    curve = [[0, 3.0], [100, 2.0], [200, 1.5]]
    assert tokens_to(curve, 3.5) == 0 and tokens_to(curve, 2.5) == 50
    assert tokens_to(curve, 1.75) == 150 and tokens_to(curve, 1.4) is None


def test_the_table_says_who_reaches_the_fit_and_when():
    def row(base, recipe, loss, curve=None):
        trained = {"held_out": curve, "tokens": 200} if curve else {"tokens": 0}
        return {"base": base, "recipe": recipe, "seed": 0, "seconds": 1.0, "loss": {"text": loss},
                **trained}
    rows = [row("fit", "none", 1.5), row("fit", "KL, LoRA", 1.2, [[0, 1.5], [200, 1.2]]),
            row("dropped", "KL, LoRA", 1.4, [[0, 2.0], [200, 1.0]]),
            row("paper", "KL, LoRA", 1.9, [[0, 2.0], [200, 1.9]])]
    lines = recovery_table(rows, {"text": 1.0}).splitlines()
    assert lines[3] == "| dropped | KL, LoRA | 200 | 1 | 4.06 | 0.4000 | 100 |"
    assert lines[4] == "| paper | KL, LoRA | 200 | 1 | 6.69 | 0.9000 | not reached |"
    assert lines[5:] == ["| fit | none | 0 | 1 | 4.48 | 0.5000 |  |",
                         "| fit | KL, LoRA | 200 | 1 | 3.32 | 0.2000 |  |"]


@pytest.mark.parametrize("theirs", ['{"a": 1}\n{"b": 2}', "notes", '{"base": "fit"}\nnotes'])
def test_a_file_that_is_not_ours_keeps_its_last_line(tmp_path, theirs):
    path = tmp_path / "results.jsonl"
    path.write_text(theirs)
    with pytest.raises(ValueError, match="holds no rows of this program"):
        compare.recovery.read_rows(path, {})
    assert path.read_text() == theirs


def test_a_row_names_places_in_the_project_from_its_root():
    bundled = Path(compare.recovery.__file__).parents[1] / "demo" / "checkpoint"
    line = compare.recovery.run("flatten.py", ckpt=bundled, samples=2, length=16, dry_run=True)
    assert line == (f"python flatten.py --ckpt {Path('demo', 'checkpoint')} --samples 2 "
                    "--length 16 --dry-run")


def test_the_comparison_compresses_trains_and_goes_on_where_it_was(ckpt, tmp_path, text_file, cli):
    options = ["--ckpt", ckpt, "--data", text_file, "--samples", 4, "--length", 16, "--steps", 2,
               "--batch", 2, "--windows", 2, "--bases", "paper", "--models", tmp_path / "models",
               "--out", tmp_path / "out", "--dtype", "bfloat16", "--recipes", "none"]
    code, out, err = cli(compare.recovery.main, *options)
    assert code == 0 and "| paper | none | 0 |" in out, err
    code, out, err = cli(compare.recovery.main, *options, "labels, LoRA")
    assert code == 0 and "| paper | labels, LoRA | 64 |" in out, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    assert [row["recipe"] for row in rows] == ["none", "labels, LoRA"]
    assert rows[1]["command"].startswith("python -m beyond.recover --ckpt ")
    assert "--dtype bfloat16" in rows[1]["command"] and "trained in bfloat16, judged in" in out
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"base": "pap')  # a kill while a row was written
    code, out, err = cli(compare.recovery.main, *options, "labels, LoRA")
    assert code == 0 and out.count("| paper |") == 2, err
    code, _, err = cli(compare.recovery.main, *options, "--steps", 3)
    assert code == 2 and "other settings" in err
    code, out, err = cli(compare.recovery.main, *options, "labels, LoRA", "KL, LoRA", "--bases",
                         "dense")
    assert code == 0 and "| dense | labels, LoRA | 64 |" in out and "| dense | KL" not in out, err
    dense, = (tmp_path / "models").glob("*/dense-0")
    for loss in ("hidden", "come"):
        code, _, err = cli(beyond.recover.main, "--ckpt", dense, "--teacher", ckpt, "--data",
                           text_file, "--loss", loss, "--length", 16)
        assert code == 2 and "compares joined blocks" in err and err.count("\n") == 1
    code, _, err = cli(compare.recovery.main, *options, "--bases", "dense", "--out",
                       tmp_path / "no")
    assert code == 2 and "nothing to do" in err and err.count("\n") == 1
    code, _, err = cli(compare.recovery.main, *options, "--lora-rate", -1)
    assert code == 2 and "--lora-rate must be positive" in err and err.count("\n") == 1
    assert rows[1]["held_out"][-1][0] == 64 and (tmp_path / "out" / "table.md").is_file()
