"""Small things to test on.

Float64 blocks with GQA, biases and unequal norms; checkpoints; text, and a tokenizer for it.
"""
import functools
import io
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from checkpoint.config import Config
from flatten import merge_groups
from model import Runner

ROOT = Path(__file__).parents[1]
# optional real inputs, in wikitext-2-raw/, tokenizers/, models/ and zeroshot/; tests skip without
DATA = Path(os.environ.get("FLATTENGPT_DATA", ROOT / "data"))

RAW = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 300,
       "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 5,
       "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
       "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
       "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
       "torch_dtype": "float32"}


def config(**changes) -> Config:
    """Return the config of a tiny Qwen2, with changes."""
    return Config.parse(RAW | changes)


def random_tensors(shapes: dict, seed: int, dtype=torch.float64) -> dict:
    """Return normal weights; norm weights are between 0.5 and 1.5: forgetting one is seen."""
    g = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.rand(shape, generator=g, dtype=torch.float64) + 0.5
        return torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5
    return {name: tensor(name, shape).to(dtype) for name, shape in shapes.items()}


def block(cfg: Config, seed: int, width: int = 1) -> dict:
    """Return the random weights of a block, as wide as `width` ordinary ones."""
    return random_tensors(cfg.block_shapes(width), seed)


def silent(weights: dict) -> dict:
    """Return the block with all weights zero except norms: it adds nothing to the stream."""
    return {name: tensor if "norm" in name else torch.zeros_like(tensor)
            for name, tensor in weights.items()}


class Blocks:
    """What merge_groups reads of a checkpoint."""

    def __init__(self, blocks: list[dict]):
        self.block = blocks.__getitem__


def merge(blocks: list[dict], xs: Tensor, run: Runner, attention: Callable,
          mlp: Callable) -> tuple[dict, dict]:
    """Merge all of these blocks as one group; xs passes through the merged block.

    Returns the block and what was kept of its members.
    """
    groups = [list(range(len(blocks)))]
    return next(merge_groups(Blocks(blocks), groups, xs, run, attention, mlp))


def runner(cfg: Config, length: int, dtype=torch.float64) -> Runner:
    """Return a Runner on the CPU."""
    return Runner(cfg, length, "cpu", dtype)


def stream(cfg: Config, n: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    """Return random streams (n, length, C)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, length, cfg.hidden_size, generator=g, dtype=torch.float64)


@functools.cache
def text(words: int = 6000) -> str:
    """Return lines of words that nobody knows."""
    rng = random.Random(0)
    letters = "abcdefghijklmnop"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(150)]
    lines = [" ".join(rng.choices(vocabulary, k=rng.randint(3, 20))) for _ in range(words // 12)]
    return "\n".join(lines) + "\n"


@functools.cache
def tokenizer_model() -> bytes:
    """Return a sentencepiece model of 300 pieces for that text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text().split("\n")), model_writer=model, vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    return model.getvalue()


def checkpoint(folder: Path, seed: int = 0, dtype=torch.float32, **changes) -> Path:
    """Write a random checkpoint in one file, with a tokenizer. Returns the folder."""
    folder.mkdir(parents=True)
    raw = RAW | changes
    cfg = Config.parse(raw)
    shapes = cfg.outer_shapes()
    for i in range(cfg.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in cfg.block_shapes().items()}
    tensors = random_tensors(shapes, seed, dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return folder


def change_tensors(path: Path, change: Callable[[dict], None]) -> None:
    """Let a function change the tensors of a checkpoint in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def hub_cache(path: Path, root: Path) -> Path:
    """Move a checkpoint into a hub cache. Returns the folder that a user would give.

    Files there are links into a folder of blobs that are named by their hashes.
    """
    blobs = root / "models--org--Tiny-1B" / "blobs"
    snapshot = root / "models--org--Tiny-1B" / "snapshots" / "0f3c"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def shown(value) -> str:
    """Write a value in one line: a tensor's dtype, shape and numbers, of a large one the first."""
    if not isinstance(value, Tensor):
        return repr(value)
    numbers = value.tolist() if value.numel() <= 16 else value.flatten()[:6].tolist()
    rounded = re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.5g}", str(numbers))
    dots = "" if value.numel() <= 16 else " and so on"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} {rounded}{dots}"


def expect(what: str, expected, came, **tolerances) -> None:
    """Compare as assert_close does. The error says what was expected and what came."""
    try:
        assert_close(came, expected, **tolerances)
    except (AssertionError, TypeError, ValueError):
        raise AssertionError(f"{what}\nexpected: {shown(expected)}\ncame:     "
                             f"{shown(came)}") from None


# ---- channels for the tests of pruning; psi, C and W are fixtures in conftest.py

F, d, n = 12, 7, 5  # channels, outputs, channels to keep
KEEP = torch.tensor([0, 3, 4, 8, 11])
DROP = torch.tensor([1, 2, 5, 6, 7, 9, 10])


def eye(n):
    """Return the identity in float64."""
    return torch.eye(n, dtype=torch.float64)


def error(W_new, W, psi, keep=KEEP):
    """Return the squared error per token of the kept channels read by W_new."""
    return float((psi[:, keep] @ W_new.T - psi @ W.T).square().sum() / len(psi))
