"""What flattening costs, and whether our model is as fast as transformers': ratios measured side by side in one run.

1. run        the whole of flatten.py, evaluation aside  /  one forward pass of the same tokens in transformers
2. forward    transformers' time / ours, for logits and for the perplexity of the same windows
3. generate   tokens per second, dense and flattened, ours and transformers'
4. memory     peak anonymous memory of flatten.py for 8 and for 32 blocks of one width

    python -m bench.cost                    on a random checkpoint made for the purpose (needs transformers)
    python -m bench.cost --ckpt PATH        on a real one, 1 to 3 only
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

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import console
import flatten
from calibrate import compute_dtype
from checkpoint.config import Config
from checkpoint.reader import Checkpoint
from console import run
from evaluate import losses
from model import generate, load
from text.stdlib import documents
from text.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


def random_checkpoint(folder: Path, blocks: int, width: int, text: str) -> Path:
    """A LLaMA of random weights with a byte vocabulary of its own; heads of 64, four to a KV head, MLP 2.75 x width."""
    import sentencepiece
    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text.split("\n")[:2000]), model_writer=model,
                                             vocab_size=1000, model_type="bpe", byte_fallback=True, minloglevel=2)
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "num_hidden_layers": blocks,
           "intermediate_size": width * 11 // 4, "num_attention_heads": width // 64,
           "num_key_value_heads": max(1, width // 256),
           "vocab_size": 1000, "torch_dtype": "float32", "max_position_embeddings": 2048}
    cfg, g = Config.parse(raw), torch.Generator().manual_seed(0)
    shapes = cfg.outer_shapes() | {f"model.layers.{i}.{name}": shape for i in range(blocks)
                                   for name, shape in cfg.block_shapes().items()}
    save_file({name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=g) * 0.02
               for name, shape in shapes.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def seconds(work) -> float:
    """Seconds that work() takes, on the device as well."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def side_by_side(works: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each work, all run in turn `repeats` times after one round of warm-up."""
    times = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            spent = seconds(work)
            if turn:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def run_script(ckpt: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """The command line of the run that is measured."""
    return ["flatten.py", "--ckpt", str(ckpt), "--ratio", str(args.ratio), "--data", args.data, "--out", str(out),
            "--samples", str(args.samples), "--length", str(args.length), "--no-eval", "--overwrite",
            "--device", args.device, "--max-group", "2"]


def flatten_quietly(ckpt: Path, out: Path, args: argparse.Namespace) -> None:
    sys.argv = run_script(ckpt, out, args)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        flatten.main()


def peak_anonymous(command: list[str]) -> int:
    """Largest anonymous memory, in bytes, of a command while it runs (Linux).

    glibc is told to return freed memory at once; else what it keeps for later, at random, is counted as well.
    """
    returned = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | returned,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{command} failed")
    return peak


def compare_speed(ckpt: Path, folder: Path, args: argparse.Namespace) -> None:
    """Measurements 1 to 3."""
    from transformers import AutoModelForCausalLM
    out, dtype = folder / "flat", compute_dtype(None, args.device, Checkpoint(ckpt).dtype)
    text = Path(args.data).read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(ckpt).encode(text))[:args.samples * args.length].view(args.samples, args.length)
    theirs, ours = AutoModelForCausalLM.from_pretrained(ckpt, dtype=dtype).to(args.device), load(ckpt, args.device, dtype)
    rows = ids.split(max(1, 2048 // args.length))

    @torch.inference_mode()
    def each(work) -> None:
        for part in rows:
            work(part.to(args.device))
    spent = side_by_side({
        "one forward in transformers": lambda: each(lambda part: theirs(part).logits),
        "one forward, ours": lambda: each(ours),
        "perplexity in transformers": lambda: each(lambda part: F.cross_entropy(
            theirs(part).logits.float()[:, :-1].flatten(0, 1), part[:, 1:].flatten())),
        "perplexity, ours": lambda: losses(ours, ids, args.device),
        "flatten.py": lambda: flatten_quietly(ckpt, out, args),
    }, args.repeats)
    for name, value in spent.items():
        print(f"{name:30s} {value:8.2f} s   {ids.numel() / value:10,.0f} tokens/s")
    base = spent["one forward in transformers"]
    print(f"run / forward in transformers          {spent['flatten.py'] / base:.2f}   (target: at most 3.5)")
    print(f"forward, transformers / ours           {base / spent['one forward, ours']:.2f}   (target: at least 1)")
    print(f"perplexity, transformers / ours        {spent['perplexity in transformers'] / spent['perplexity, ours']:.2f}"
          "   (target: at least 1)\n")

    prompt, new = ids[:1, :16].to(args.device), 64
    nets = {"dense": ckpt, "flattened": out}
    theirs = {name: AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device) for name, path in nets.items()}
    ours = {name: load(path, args.device, dtype) for name, path in nets.items()}

    def hf(name: str) -> None:
        theirs[name].generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    works = {f"{name}, transformers": lambda name=name: hf(name) for name in nets}
    works |= {f"{name}, ours": lambda name=name: generate(ours[name], prompt, new) for name in nets}
    spent = side_by_side(works, args.repeats)
    for name, value in spent.items():
        print(f"generate {new} tokens, {name:25s} {new / value:8.1f} tokens/s")
    print(f"generation, ours / transformers        {spent['dense, transformers'] / spent['dense, ours']:.2f} dense, "
          f"{spent['flattened, transformers'] / spent['flattened, ours']:.2f} flattened")
    blocks = [Checkpoint(path).config.num_hidden_layers for path in nets.values()]
    print(f"generation, flattened / dense          {spent['dense, ours'] / spent['flattened, ours']:.2f} ours "
          f"({blocks[0]} / {blocks[1]} blocks = {blocks[0] / blocks[1]:.2f})\n")


def compare_memory(folder: Path, text: str, args: argparse.Namespace) -> None:
    """Measurement 4, on 64 windows of 128 tokens: what is measured does not need more."""
    args = argparse.Namespace(**vars(args) | {"samples": 64, "length": 128})
    peaks = {blocks: peak_anonymous(run_script(random_checkpoint(folder / f"deep{blocks}", blocks, args.width, text),
                                               folder / f"flat{blocks}", args)) for blocks in (8, 32)}
    for blocks, peak in peaks.items():
        print(f"peak anonymous memory, {blocks:2d} blocks of width {args.width}: {peak / 2**20:,.0f} MB")
    print(f"32 blocks / 8 blocks                   {peaks[32] / peaks[8]:.3f}   (target: within 10 %)")


def main() -> None:
    parser = console.parser("Benchmarks.", __doc__)
    parser.add_argument("--ckpt", type=Path, help="a real checkpoint (default: a random one)")
    parser.add_argument("--data", help="a text file (default: Python's own documentation)")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512, help="of the random checkpoints")
    parser.add_argument("--blocks", type=int, default=12, help="of the random checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    import transformers
    print(f"{device}, {platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}; "
          f"{args.samples} x {args.length} tokens, ratio {args.ratio}, medians of {args.repeats}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.data is None:
            args.data = str(folder / "text.txt")
            Path(args.data).write_text("\n".join(documents(evaluation=False).values())[:1_000_000], encoding="utf-8")
        text = Path(args.data).read_text(encoding="utf-8")
        ckpt = args.ckpt or random_checkpoint(folder / "random", args.blocks, args.width, text)
        print(f"model: {ckpt if args.ckpt else f'random weights, {args.blocks} blocks, width {args.width}'}\n")
        compare_speed(ckpt, folder, args)
        if args.ckpt is None:
            compare_memory(folder, text, args)


if __name__ == "__main__":
    run(main)
