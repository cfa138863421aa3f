"""Small things to test on: float64 blocks with GQA, biases and unequal norms; checkpoints; text and a tokenizer for it."""
import functools
import io
import json
import random
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

from calibrate import Runner
from checkpoint.config import Config

DATA = Path(__file__).parents[2] / "shared" / "data"  # real inputs, where a developer has them

RAW = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 300, "hidden_size": 32,
       "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
       "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
       "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}


def config(**changes) -> Config:
    return Config.parse(RAW | changes)


def random_tensors(shapes: dict, seed: int, dtype=torch.float64) -> dict:
    """Normal weights; norm weights between 0.5 and 1.5, so that forgetting one is seen."""
    g = torch.Generator().manual_seed(seed)
    return {name: ((torch.rand(shape, generator=g, dtype=torch.float64) + 0.5) if "norm" in name else
                   torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)
            for name, shape in shapes.items()}


def block(cfg: Config, seed: int, width: int = 1) -> dict:
    return random_tensors(cfg.block_shapes(width), seed)


class FakeSource:
    """What Runner needs of a checkpoint."""
    def __init__(self, cfg: Config):
        self.config = cfg


def runner(cfg: Config, length: int, dtype=torch.float64) -> Runner:
    return Runner(FakeSource(cfg), length, "cpu", dtype)


def stream(cfg: Config, n: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, length, cfg.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def text(words: int = 6000) -> str:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(150)]
    lines = [" ".join(rng.choices(vocabulary, k=rng.randint(3, 20))) for _ in range(words // 12)]
    return "\n".join(lines) + "\n"


@functools.cache
def tokenizer_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text().split("\n")), model_writer=model, vocab_size=300,
                                             model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    return model.getvalue()


def checkpoint(folder: Path, seed: int = 0, dtype=torch.float32, **changes) -> Path:
    """A random checkpoint in one file, with a tokenizer."""
    folder.mkdir(parents=True)
    raw = RAW | changes
    cfg = Config.parse(raw)
    shapes = cfg.outer_shapes() | {f"model.layers.{i}.{name}": shape for i in range(cfg.num_hidden_layers)
                                   for name, shape in cfg.block_shapes().items()}
    save_file(random_tensors(shapes, seed, dtype), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return folder


def hub_cache(path: Path, root: Path) -> Path:
    """Move a checkpoint into a hub cache, whose files are links into a folder of blobs named by their hashes."""
    blobs, snapshot = root / "models--org--Tiny-1B" / "blobs", root / "models--org--Tiny-1B" / "snapshots" / "0f3c"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot
