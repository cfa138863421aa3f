"""Train a compressed model for a while, with the dense model as its teacher.

Takes the result of any method that joins neighbours or leaves blocks out. Trained is a LoRA at
every projection, or the last blocks with norm and head (--last), or everything (--full). What the
model learns from is one of four (--loss; see beyond/lessons.py). A LoRA is merged at the end, so
the result is an ordinary checkpoint of the same shapes.

A run is saved beside its output after its first step and every few minutes. After a kill the same
command with --resume goes on from there, and ends with the same weights.

    python -m beyond.recover --ckpt out/NAME-refit-0.2 --teacher PATH
    python -m beyond.recover --ckpt out/NAME-refit-0.2 --teacher PATH --data questions.json
"""
import argparse
from functools import partial
from pathlib import Path

import torch

import console
import parallel
from beyond.lessons import LOSSES, lesson
from beyond.lora import add_lora, merge_lora
from beyond.material import draw, is_json, read_lessons
from beyond.training import alone, held_out_loss, read_state, train, training_args
from checkpoint.beside import model_card
from checkpoint.config import read_json
from checkpoint.reader import Checkpoint, Weights
from checkpoint.writer import Writer, check_output
from console import command
from console.options import compute_dtype
from evaluate import compare
from model import Transformer, load
from text import wikitext

JUDGED = 16  # held-out windows whose loss is measured
OPTIONS = ("loss", "last", "full", "steps", "batch", "length", "rate", "seed", "checkpointing",
           "dtype", "device")


# ---- what belongs together

def correspondence(student: Checkpoint, teacher: Checkpoint) -> tuple[dict, list[list[int]]]:
    """Read a result's flatten.json, and which of the teacher's blocks each block stands for.

    ValueError if the result was not made of this teacher.
    """
    if student.is_wide:
        raise ValueError(f"{student.path} has wide blocks; python flatten.py --ckpt "
                         f"{student.path} makes them ordinary first")
    path = student.path / "flatten.json"
    if not path.is_file():
        raise ValueError(f"{student.path} has no flatten.json: --ckpt must be a result of "
                         "flatten.py, beyond.refit or compare --save")
    record = read_json(path)
    if record.get("source_sha256") != teacher.digest():
        raise ValueError(f"{student.path} was not made of {teacher.path}, or by an earlier version "
                         "(source_sha256 in flatten.json); give the dense model that was "
                         "compressed, or compress again")
    try:
        groups = [[int(i) for i in group["blocks"]] for group in record["groups"]]
        model_card(student.name, student.raw, record)  # will be made again of the same record
        sound = all(groups) and record["parameters_before"] > 0
    except (KeyError, TypeError, ValueError):
        groups, sound = [], False
    blocks = [i for group in groups for i in group]
    if (not sound or blocks != list(range(teacher.config.num_hidden_layers))
            or len(groups) != student.config.num_hidden_layers):
        raise ValueError(f"{path} does not say which of the teacher's blocks each block stands "
                         "for; recovery is for models made by joining neighbours or leaving "
                         "blocks out")
    return record, groups


def unfreeze(net: Transformer, args: argparse.Namespace) -> None:
    """Let gradients reach what is to be trained, of a frozen model."""
    if args.full:
        net.requires_grad_(True)
    elif args.last:
        head = net.lm_head or net.model["embed_tokens"]  # a tied head is the embedding table
        for part in (*net.model["layers"][-args.last:], net.model["norm"], head):
            part.requires_grad_(True)
    else:
        add_lora(net, args.seed)


def trained_or_stored(now: Weights, stored: Weights) -> Weights:
    """Return the tensors that have changed, in the dtype of the stored ones, and else the stored.

    So what was not trained stays as it is, whatever dtype it was computed in.
    """
    result = {}
    for name, tensor in stored.items():
        new = now[name].cpu()
        same = torch.equal(new, tensor.to(new.dtype))
        result[name] = tensor if same else new.to(tensor.dtype)
    return result


# ---- the command

def parse_args() -> argparse.Namespace:
    parser = console.parser("Train a compressed model with the dense model as its teacher.",
                            __doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="the dense model that --ckpt was made of")
    add("--loss", choices=LOSSES, default="kl", help="default: %(default)s")
    add("--last", type=int, default=0, metavar="N",
        help="train the last N blocks, the final norm and the head, without LoRA")
    add("--full", action="store_true", help="train everything, without LoRA")
    add("--checkpointing", action="store_true", help="save memory: run each block twice")
    add("--overwrite", action="store_true", help="replace an earlier result")
    add("--resume", action="store_true", help="go on with a run that was killed, if there is one")
    add("--no-eval", action="store_true", help="do not compare perplexity at the end")
    args = training_args(parser, None, "0.001, with --full or --last 0.0001")
    if args.full and args.last:
        raise ValueError("--full trains everything and --last a part; give one of them")
    if args.rate is None:
        args.rate = 1e-4 if args.full or args.last else 1e-3
    return args


def learn(groups: list[list[int]], texts: list, held_out: list, dtype: torch.dtype, path: Path,
          run: dict, args: argparse.Namespace) -> tuple[Transformer, dict]:
    """Train the student, from the state at `path` if there is one. Returns it and the facts."""
    judge = partial(held_out_loss, batch=draw(held_out, JUDGED, args.length, seed=0),
                    device=args.device)
    # no cache: it would keep the first bfloat16 copy of weights that change
    with torch.autocast(torch.device(args.device).type, torch.bfloat16,
                        enabled=dtype != torch.float32, cache_enabled=False):
        teacher = load(args.teacher, args.device, dtype)
        facts = {"dense": judge(teacher)}
        if args.loss == "labels":
            teacher = None  # it has nothing more to say, and takes memory
        # Autocast rounds copies; what is stored in more digits keeps them.
        student = load(args.ckpt, args.device, dtype if dtype == torch.float32 else None)
        unfreeze(student, args)
        teach = partial(lesson, args.loss, student, teacher, groups,
                        checkpointing=args.checkpointing)
        facts = train(teach, student, texts, path, run, facts, args, partial(judge, student))
    merge_lora(student)
    return student, facts


def main() -> None:
    args = parse_args()
    source, dense = Checkpoint(args.ckpt), Checkpoint(args.teacher)
    record, groups = correspondence(source, dense)
    if not 0 <= args.last <= len(groups):
        raise ValueError(f"--last must be between 0 and the model's {len(groups)} blocks; got "
                         f"{args.last}")
    if args.loss in ("hidden", "come") and all(len(group) == 1 for group in groups):
        raise ValueError(f"--loss {args.loss} compares joined blocks, and {source.path} has none; "
                         "give --loss labels or kl")
    if args.loss == "come" and args.last and all(len(g) == 1 for g in groups[-args.last:]):
        raise ValueError(f"--loss come trains joined blocks, and none of the last {args.last} is "
                         "one; leave out --last")
    dtype = compute_dtype(args.dtype, args.device, source.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    out = args.out or Path("out") / f"{source.name}-recovered"
    check_output(out, dense.path, args.overwrite)
    no_text = args.no_eval or is_json((args.data or [None])[0])
    judged = None if no_text else wikitext.held_out_text(args.data)
    unfinished = out.with_name(f"{out.name}.unfinished")
    with Writer(out, source, args.overwrite) as writer, \
            alone(unfinished, "--resume goes on there"):
        if unfinished.exists() and not args.resume:
            raise ValueError(f"{unfinished} is of a run that was killed; --resume goes on with "
                             "it, or delete it")
        texts, held_out, about = read_lessons(args, source)
        chosen = {name: getattr(args, name) for name in OPTIONS}
        line = command("-m beyond.recover", ckpt=args.ckpt, teacher=args.teacher, data=args.data,
                       **chosen | {"last": args.last or None})
        run = {**chosen, "processes": parallel.ranks(), "student_sha256": source.digest(),
               "command": line, **about}
        read_state(unfinished, run, {})  # a wrong file is told before the models are loaded
        student, facts = learn(groups, texts, held_out, dtype, unfinished, run, args)
        for k, block in enumerate(student.model["layers"]):
            writer.add(trained_or_stored(block.state_dict(), source.block(k)))
        record["recovery"] = [*record.get("recovery", []), run | facts]
        writer.finish([[k] for k in range(len(groups))], record,
                      outer=trained_or_stored(student.state_dict(), source.outer()))
        unfinished.unlink(missing_ok=True)
    print(f"wrote {out}: {facts['steps']} steps, {facts['tokens']:,} tokens, "
          f"{facts['seconds']:.0f} s; held-out loss "
          f"{facts['held_out'][0][1]:.4f} -> {facts['held_out'][-1][1]:.4f}, of the dense model "
          f"{facts['dense']:.4f}")
    if judged:
        compare([args.teacher, args.ckpt, out], *judged, window=args.length,
                device=args.device, dtype=args.dtype, stream=True)


if __name__ == "__main__":
    console.run(main, torchrun="together")
