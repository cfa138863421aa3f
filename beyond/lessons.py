"""What a compressed model learns from: the text, or the dense model as its teacher.

The stream keeps its width, and flatten.json says which blocks became one. So the teacher can teach
every block directly, with no map between widths.

    labels    -log q(next token)                            the paper's recovery fine-tuning
    kl        KL(p || q), p the teacher's predictions       distillation
    hidden    kl + c hidden_loss, c = kl / hidden_loss      Minitron, arXiv 2407.14679
    come      hidden_loss of each block alone, on the teacher's stream, for the first half; then kl

CoMe (arXiv 2510.15304) has not published how it trains. The form of its two stages is ours.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evaluate import kullback_leibler
from model import Block, Transformer, rope_table

LOSSES = ("labels", "kl", "hidden", "come")
PIECE = 1024  # tokens whose logits exist at a time


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses (n,) of the right tokens, targets (n,), for logits (n, V)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def teacher_loss(logits: Tensor, teachers: Tensor) -> Tensor:
    """Return KL(p || q) (n,) in nats, q of logits (n, V) and p of the teacher's (n, V)."""
    return kullback_leibler(teachers.float().log_softmax(-1), logits.float().log_softmax(-1))


def hidden_loss(streams: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """Return the mean over blocks of E|y - t|^2 / E|t|^2, over the n tokens of y and t (n, C).

    y is the stream after a block, and t the teacher's after the last block that it stands for.
    """
    pairs = [(y.float(), t.float()) for y, t in zip(streams, teachers, strict=True)]
    return torch.stack([(y - t).pow(2).sum() / t.pow(2).sum() for y, t in pairs]).mean()


def balanced(loss: Tensor, other: Tensor) -> Tensor:
    """Return loss + c * other. The weight c makes both equal, and no gradient flows through it."""
    return loss + loss.detach() / other.detach().clamp_min(1e-30) * other


def streams(net: Transformer, x: Tensor, checkpointing: bool = False) -> list[Tensor]:
    """Return the streams (B, T, C): x, which enters the first block, and what leaves each block.

    With checkpointing a block runs again in the backward pass, so its inner values are not kept.
    """
    xs, rope = [x], rope_table(net.config, 0, x.shape[1], like=x)
    for block in net.model["layers"]:
        xs.append(run(block, xs[-1], rope, checkpointing))
    return xs


def run(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], checkpointing: bool) -> Tensor:
    """Run a block, with checkpointing if wanted."""
    return checkpoint(block, x, rope, use_reentrant=False) if checkpointing else block(x, rope)


def in_pieces(loss: Callable[[Tensor, Tensor], Tensor], states: Tensor, others: Tensor) -> Tensor:
    """Return the losses (n,) of n tokens, for states (n, C) and what belongs to each (n, ...).

    A vocabulary is large, so logits exist for a piece of the tokens at a time. They are made again
    in the backward pass.
    """
    pieces = zip(states.split(PIECE), others.split(PIECE), strict=True)
    return torch.cat([checkpoint(loss, x, other, use_reentrant=False) for x, other in pieces])


def logits(net: Transformer, states: Tensor) -> Tensor:
    """Return the logits (n, V) of streams (n, C) that leave the last block."""
    return net.head(net.model["norm"](states))


def label_losses(net: Transformer, states: Tensor, targets: Tensor) -> Tensor:
    """Return the losses (n,) of the right tokens, targets (n,), for streams as above."""
    return in_pieces(lambda x, y: label_loss(logits(net, x), y), states, targets)


def lesson(loss: str, student: Transformer, teacher: Transformer | None, groups: list[list[int]],
           ids: Tensor, learned: Tensor, done: float = 0.0, checkpointing: bool = False) -> Tensor:
    """Return the loss of this name, for ids (B, T) whose tokens in `learned` (B, T) are predicted.

    groups[k] are the teacher's blocks that block k stands for; where there are several, the hidden
    loss compares. `done` is the share of the training that is over. The loss is in nats a token,
    but in come's first stage a ratio.
    """
    predicting = learned[:, 1:]                                             # (B, T - 1)

    def pick(x: Tensor) -> Tensor:
        return x[:, :-1][predicting]                                        # (n, ...)

    if loss != "labels":
        with torch.no_grad():
            ts = streams(teacher, teacher.model["embed_tokens"](ids))
        joined = [(k, group[0], group[-1] + 1) for k, group in enumerate(groups) if len(group) > 1]
        targets = [pick(ts[stop]) for _, _, stop in joined]
    if loss == "come" and done < 0.5:
        blocks, rope = student.model["layers"], rope_table(student.config, 0, ids.shape[1], ts[0])
        ys = [run(blocks[k], ts[start], rope, checkpointing) for k, start, _ in joined]
        return hidden_loss([pick(y) for y in ys], targets)
    xs = streams(student, student.model["embed_tokens"](ids), checkpointing)
    if loss == "labels":
        return label_losses(student, pick(xs[-1]), ids[:, 1:][predicting]).mean()
    kl = in_pieces(lambda x, t: teacher_loss(logits(student, x), logits(teacher, t)),
                   pick(xs[-1]), pick(ts[-1])).mean()
    if loss != "hidden":
        return kl
    return balanced(kl, hidden_loss([pick(xs[k + 1]) for k, _, _ in joined], targets))
