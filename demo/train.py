"""Pretrain a small LLaMA from random weights, on text that every Python installation has.

A lesson in one file:

1. text       the standard library's documentation and sources, without the held-out part
2. tokens     a sentencepiece BPE vocabulary learned on that text
3. weights    normal numbers of deviation 0.02, or 0.02 / sqrt(2 L) where a block writes its output
4. training   AdamW on random windows of 256 tokens; the rate warms up, stays, and falls to zero
5. files      an ordinary Hugging Face LLaMA checkpoint in bfloat16; the loss curve as JSON lines

    python -m demo.train --out out/demo --compile       about 40 minutes on two CPU cores
"""
import argparse
import io
import json
import math
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import console
from checkpoint.beside import tokenizer_config, write_json
from checkpoint.config import Config
from console.options import DEFAULT_DEVICE
from model import Block, Transformer
from text.stdlib import documents


def architecture(width: int, blocks: int, heads: int, kv_heads: int, channels: int,
                 vocabulary: int) -> dict:
    """Return the config.json of a LLaMA of this shape, with tied embeddings."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": width, "intermediate_size": channels, "num_hidden_layers": blocks,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": width // heads, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "vocab_size": vocabulary, "tie_word_embeddings": True,
            "max_position_embeddings": 256, "attention_bias": False,
            "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}


def learn_vocabulary(texts: list[str], pieces: int) -> bytes:
    """Learn a sentencepiece BPE model with this number of pieces, and return the file's bytes.

    Spaces are kept as they are, because code needs its indentation.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=pieces, model_type="bpe",
        byte_fallback=True, split_digits=True, user_defined_symbols=["\n"],
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, add_dummy_prefix=False, num_threads=1, minloglevel=2)
    return model.getvalue()


def encode(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str]) -> Tensor:
    """Return all texts as one row of ids, BOS in front of each."""
    ids = []
    for text in texts:
        ids += [tokenizer.bos_id(), *tokenizer.encode(text)]
    return torch.tensor(ids)


def initial_model(config: Config, seed: int) -> Transformer:
    """Return a model of random weights: norms are one, matrices normal with deviation 0.02.

    What writes to the residual stream is divided by sqrt(2 L), because the stream is a sum of 2 L
    such terms. So it starts with about the same size at any depth.
    """
    generator, L = torch.Generator().manual_seed(seed), config.num_hidden_layers

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape)
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        return torch.randn(shape, generator=generator) * 0.02 / (math.sqrt(2 * L) if writes else 1)

    def tensors(shapes: dict) -> dict:
        return {name: tensor(name, shape) for name, shape in shapes.items()}
    blocks = [Block(tensors(config.block_shapes()), config) for _ in range(L)]
    return Transformer(config, blocks, tensors(config.outer_shapes()))


def rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Return the learning rate at a step.

    It rises linearly, stays constant, and falls linearly to zero over the last 40 % of the steps.
    """
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (0.4 * steps))


def loss_of(net: Transformer, windows: Tensor) -> Tensor:
    """Return the mean next-token loss of windows (B, T + 1).

    Autocast computes in bfloat16 where that is safe.
    """
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        logits = net(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def batch(ids: Tensor, size: int, length: int, generator: torch.Generator) -> Tensor:
    """Return random windows (size, length + 1) of a row of ids."""
    starts = torch.randint(len(ids) - length, (size,), generator=generator)
    return torch.stack([ids[start:start + length + 1] for start in starts.tolist()])


def save(net: Transformer, config: dict, vocabulary: bytes, out: Path) -> None:
    """Write config.json, weights in bfloat16 and the tokenizer's two files into a folder."""
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "tokenizer.model").write_bytes(vocabulary)
    write_json(out / "tokenizer_config.json", tokenizer_config(vocabulary))
    weights = {name: weight.detach().to("cpu", torch.bfloat16).contiguous()
               for name, weight in net.state_dict().items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def parse_args() -> argparse.Namespace:
    parser = console.parser("Pretrain a small LLaMA on Python's own text.", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder; must not exist")
    for name, value in {"width": 128, "blocks": 24, "heads": 4, "kv-heads": 2, "channels": 352,
                        "vocabulary": 4096, "steps": 3000, "batch": 16, "length": 256,
                        "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--peak", type=float, default=3e-3,
                        help="largest learning rate (default %(default)s)")
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="default: %(default)s")
    parser.add_argument("--compile", action="store_true",
                        help="use torch.compile (needs a C++ compiler)")
    args = parser.parse_args()
    if min(args.steps, args.batch, args.length, args.heads) < 1:
        raise ValueError("--steps, --batch, --length and --heads must be at least 1")
    if args.out.exists():
        raise ValueError(f"{args.out} exists already; choose another --out")
    return args


def optimizer_for(net: Transformer) -> torch.optim.Optimizer:
    """Return AdamW for a model; its matrices decay, its norms do not."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim == 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                              {"params": vectors, "weight_decay": 0.0}],
                             betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def held_out_loss(net: Transformer, windows: Tensor, size: int) -> float:
    """Return the mean loss of windows (N, T + 1), `size` at a time."""
    total = sum(loss_of(net, part).item() * len(part) for part in windows.split(size))
    return total / len(windows)


def main() -> None:
    args = parse_args()
    raw = architecture(args.width, args.blocks, args.heads, args.kv_heads, args.channels,
                       args.vocabulary)
    config = Config.parse(raw)
    args.out.mkdir(parents=True)

    texts, held_out_texts = (list(documents(evaluation).values()) for evaluation in (False, True))
    vocabulary = learn_vocabulary(texts, args.vocabulary)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    train, test = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    net = initial_model(config, args.seed).to(args.device)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{len(train):,} training tokens, {len(test):,} held out, {parameters:,} parameters")

    optimizer = optimizer_for(net)
    if args.compile:
        for block in net.model["layers"]:
            block.compile()  # all blocks share one compiled graph
    generator = torch.Generator().manual_seed(args.seed)
    test_windows = batch(test, 64, args.length, torch.Generator().manual_seed(args.seed))
    test_windows = test_windows.to(args.device)
    start = time.monotonic()
    with open(args.out / "loss.jsonl", "w") as log:
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, args.steps, args.peak)
            loss = loss_of(net, batch(train, args.batch, args.length, generator).to(args.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 0 or step == args.steps - 1:
                test_loss = held_out_loss(net, test_windows, args.batch)
                row = {"step": step, "tokens": (step + 1) * args.batch * args.length,
                       "train": round(loss.item(), 4), "held_out": round(test_loss, 4)}
                log.write(json.dumps(row) + "\n")
                log.flush()
                save(net, raw, vocabulary, args.out)
                left = (time.monotonic() - start) / (step + 1) * (args.steps - step - 1)
                print(json.dumps(row), f"{left / 60:.0f} min left", flush=True)


if __name__ == "__main__":
    console.run(main)
