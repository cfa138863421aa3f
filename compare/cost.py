"""Measure what flattening costs, and how fast our model is next to transformers'.

1. run        the whole of flatten.py, without evaluation  /  one forward pass in transformers,
              and the whole of the fit, with the same groups  /  that of flatten.py
2. forward    transformers' time / ours, for logits and for the perplexity of the same windows
3. generate   tokens per second, dense and flattened, ours and transformers'
4. memory     peak anonymous memory of flatten.py for 8 and for 32 blocks of one width

All ratios are between times measured side by side, in one run and on the same tokens.

    python -m compare.cost                    on a random checkpoint (needs transformers)
    python -m compare.cost --ckpt PATH        on a real one, 1 to 3 only
"""
import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import console
import flatten
from beyond import refit
from calibrate import SAMPLE
from checkpoint.config import Config
from checkpoint.reader import Checkpoint
from compare.speed import elapsed
from console import forecast
from console.options import DEFAULT_DEVICE, compute_dtype
from evaluate import losses
from model import generate, load
from text.stdlib import documents
from text.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


def random_checkpoint(folder: Path, blocks: int, width: int, text: str) -> Path:
    """Write a LLaMA of random weights, with a byte vocabulary of its own. Returns the folder.

    Heads have 64 channels, four query heads share a KV head, and the MLP is 2.75 x width.
    """
    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")[:2000]), model_writer=model, vocab_size=1000,
        model_type="bpe", byte_fallback=True, minloglevel=2)
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width,
           "num_hidden_layers": blocks, "intermediate_size": width * 11 // 4,
           "num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256),
           "vocab_size": 1000, "torch_dtype": "float32", "max_position_embeddings": 2048}
    cfg, g = Config.parse(raw), torch.Generator().manual_seed(0)
    shapes = cfg.outer_shapes() | {f"model.layers.{i}.{name}": shape for i in range(blocks)
                                   for name, shape in cfg.block_shapes().items()}
    tensors = {name: torch.ones(shape) if "norm" in name else
               torch.randn(shape, generator=g) * 0.02 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def side_by_side(works: dict, repeats: int, device: str) -> dict[str, float]:
    """Return the median seconds of each work: all run in turn, `repeats` times after a warm-up."""
    times = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            seconds = elapsed(work, device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(each) for name, each in times.items()}


def run_script(ckpt: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """Return the command line of the run that is measured."""
    return ["flatten.py", "--ckpt", str(ckpt), "--out", str(out), "--overwrite", "--no-eval",
            "--ratio", str(args.ratio), "--max-group", "2", "--data", args.data,
            "--samples", str(args.samples), "--length", str(args.length), "--device", args.device]


def run_quietly(command: ModuleType, line: list[str]) -> None:
    """Run flatten.py or the fit, with this command line, in this process. Prints nothing."""
    sys.argv = line
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command.main()


def peak_anonymous(command: list[str]) -> int:
    """Return the most anonymous memory, in bytes, that a command has while it runs (Linux).

    glibc is told to return freed memory at once. Else the memory that it keeps for later would
    count as well, and how much it keeps is chance.
    """
    returned = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | returned,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{command} failed")
    return peak


def compare_forward(ckpt: Path, out: Path, ids: Tensor, args: argparse.Namespace) -> None:
    """Print measurements 1 and 2 on windows of ids (N, T). Leaves the flattened model in `out`."""
    from transformers import AutoModelForCausalLM
    dtype = compute_dtype(None, args.device, Checkpoint(ckpt).dtype)
    theirs = AutoModelForCausalLM.from_pretrained(ckpt, dtype=dtype).to(args.device)
    ours = load(ckpt, args.device, dtype)
    parts = ids.split(max(1, 2048 // args.length))

    @torch.inference_mode()
    def each(work) -> None:
        for part in parts:
            work(part.to(args.device))

    def their_loss(part: Tensor) -> Tensor:
        logits = theirs(part).logits.float()[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
    line = run_script(ckpt, out, args)
    spent = side_by_side({
        "one forward in transformers": lambda: each(lambda part: theirs(part).logits),
        "one forward, ours": lambda: each(ours),
        "perplexity in transformers": lambda: each(their_loss),
        "perplexity, ours": lambda: losses(ours, ids, args.device),
        "the fit by similarity": lambda: run_quietly(refit, [*line, "--group-by", "similarity"]),
        "flatten.py": lambda: run_quietly(flatten, line),
    }, args.repeats, args.device)
    for name, seconds in spent.items():
        print(f"{name:30s} {seconds:8.2f} s   {ids.numel() / seconds:10,.0f} tokens/s")
    base = spent["one forward in transformers"]
    fit = spent["the fit by similarity"] / spent["flatten.py"]
    run, forward = spent["flatten.py"] / base, base / spent["one forward, ours"]
    perplexity = spent["perplexity in transformers"] / spent["perplexity, ours"]
    print(f"run / forward in transformers          {run:.2f}   (target: at most 2.4)")
    print(f"the fit by similarity / flatten.py     {fit:.2f}   (target: at most 1.5)")
    print(f"forward, transformers / ours           {forward:.2f}   (target: at least 1)")
    print(f"perplexity, transformers / ours        {perplexity:.2f}   (target: at least 1)\n")


def compare_generation(ckpt: Path, out: Path, prompt: Tensor, args: argparse.Namespace) -> None:
    """Print measurement 3 for the dense model in `ckpt` and the flattened one in `out`."""
    from transformers import AutoModelForCausalLM
    new, folders = 64, {"dense": ckpt, "flattened": out}
    dtype = compute_dtype(None, args.device, Checkpoint(ckpt).dtype)
    theirs = {name: AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device)
              for name, path in folders.items()}
    ours = {name: load(path, args.device, dtype) for name, path in folders.items()}

    def their_generate(name: str) -> None:
        theirs[name].generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                              pad_token_id=0)
    works = {f"{name}, transformers": lambda name=name: their_generate(name) for name in folders}
    works |= {f"{name}, ours": lambda name=name: generate(ours[name], prompt, new)
              for name in folders}
    spent = side_by_side(works, args.repeats, args.device)
    for name, seconds in spent.items():
        print(f"generate {new} tokens, {name:25s} {new / seconds:8.1f} tokens/s")
    dense, flattened = (spent[f"{name}, transformers"] / spent[f"{name}, ours"] for name in folders)
    print(f"generation, ours / transformers        {dense:.2f} dense, {flattened:.2f} flattened")
    faster = spent["dense, ours"] / spent["flattened, ours"]
    before, after = (Checkpoint(path).config.num_hidden_layers for path in folders.values())
    print(f"generation, flattened / dense          {faster:.2f} ours "
          f"({before} / {after} blocks = {before / after:.2f})\n")


def compare_memory(folder: Path, text: str, args: argparse.Namespace) -> None:
    """Print measurement 4, on 64 windows of 128 tokens: depth is what matters here, not text."""
    args = argparse.Namespace(**vars(args) | {"samples": 64, "length": 128})
    peaks = {}
    for blocks in (8, 32):
        ckpt = random_checkpoint(folder / f"deep{blocks}", blocks, args.width, text)
        script = run_script(ckpt, folder / f"flat{blocks}", args)
        peaks[blocks], imports = peak_anonymous(script), peak_anonymous([*script, "--dry-run"])
        shape = Checkpoint(ckpt).config, args.samples, args.length, 4
        foretold = max(sum(parts.values()) for parts in (forecast.measuring(*shape, SAMPLE),
                                                         forecast.pruning(*shape, width=2)))
        print(f"peak anonymous memory, {blocks:2d} blocks of width {args.width}: "
              f"{peaks[blocks] / 1e6:,.0f} MB, less {imports / 1e6:,.0f} for imports; "
              f"foretold {foretold / 1e6:,.0f}")
    print(f"32 blocks / 8 blocks                   {peaks[32] / peaks[8]:.3f}   "
          "(target: within 10 %)")


def parse_args() -> argparse.Namespace:
    parser = console.parser("Measure what flattening costs, next to transformers.", __doc__)
    parser.add_argument("--ckpt", type=Path, help="a real checkpoint (default: a random one)")
    parser.add_argument("--data", help="a text file (default: Python's own documentation)")
    parser.add_argument("--ratio", type=float, default=0.2,
                        help="fraction of all parameters to remove (default %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="windows (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048,
                        help="tokens in a window (default %(default)s)")
    parser.add_argument("--width", type=int, default=512,
                        help="of the random checkpoints (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=12,
                        help="of the random checkpoint (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3,
                        help="runs; their median counts (default %(default)s)")
    parser.add_argument("--device", default=DEFAULT_DEVICE, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import transformers
    on_gpu = torch.device(args.device).type == "cuda"
    device = torch.cuda.get_device_name(args.device) if on_gpu else \
        f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, {platform.machine()}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}; {args.samples} x {args.length} tokens, "
          f"ratio {args.ratio}, medians of {args.repeats}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.data is None:
            args.data = str(folder / "text.txt")
            library = "\n".join(documents(evaluation=False).values())
            Path(args.data).write_text(library[:1_000_000], encoding="utf-8")
        text = Path(args.data).read_text(encoding="utf-8")
        if args.ckpt:
            ckpt, kind = args.ckpt, args.ckpt
        else:
            ckpt = random_checkpoint(folder / "random", args.blocks, args.width, text)
            kind = f"random weights, {args.blocks} blocks, width {args.width}"
        print(f"model: {kind}\n")
        ids = torch.tensor(load_tokenizer(ckpt).encode(text))[:args.samples * args.length]
        ids = ids.view(args.samples, args.length)
        compare_forward(ckpt, folder / "flat", ids, args)
        compare_generation(ckpt, folder / "flat", ids[:1, :16].to(args.device), args)
        if args.ckpt is None:
            compare_memory(folder, text, args)


if __name__ == "__main__":
    console.run(main)
