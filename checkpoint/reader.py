"""Read a checkpoint folder in Hugging Face layout, block by block, from safetensors files only.

Tensors come as views of the memory-mapped file. So of a model larger than memory only the block
that is being looked at takes memory.
"""
import hashlib
import math
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.config import WIDE, Config, read_json, refuse_pointer

Weights = dict[str, Tensor]  # checkpoint name, of a block's without "model.layers.N." -> tensor
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHOWN = 4  # names of a long list
CONVERT = ("python -c \"from transformers import AutoModelForCausalLM as M; "
           "M.from_pretrained('OLD').save_pretrained('NEW')\"")
MERGE = ("python -c \"from peft import AutoPeftModelForCausalLM as M; "
         "M.from_pretrained('OLD').merge_and_unload().save_pretrained('NEW')\"")
FIRST = "layers.0.input_layernorm.weight"  # in every model; all names have its prefix
WRAPPERS = {"_orig_mod.": "model._orig_mod", "module.": "model.module",
            "base_model.": "model.merge_and_unload()"}


class Checkpoint:
    """A checkpoint folder whose config, files, names, shapes and dtypes have been checked.

    No tensor is read yet. ValueError, in one line, if the folder is not a checkpoint, if its config
    asks for unsupported wiring, or if a file is missing or corrupt. Tensors that are missing,
    unexpected or misshapen are counted and named all at once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            what = "not a" if self.path.exists() else "no such"
            raise ValueError(f"{path!s:.200}: {what} folder; expected one with config.json and "
                             "*.safetensors files")
        if not (self.path / "config.json").is_file():
            self._refuse_adapter()
            raise ValueError(f"{path} is not a checkpoint: it has no config.json")
        self.hub_id = hub_id(self.path)
        self.name = (self.hub_id or self.path.resolve().name).split("/")[-1]  # for outputs, tables
        self.raw = read_json(self.path / "config.json")
        self.config = Config.read(self.path)
        self.is_wide = self.raw.get("model_type") == WIDE
        self._files = {}
        self._where = self._locate()  # tensor name -> (open file, name in that file)
        if self.config.tie_word_embeddings and HEAD in self._where and TABLE not in self._where:
            self._where[TABLE] = self._where.pop(HEAD)  # two names of one tensor: this was kept
        self._check_tensors()
        self.dtype = STORED[self._slice(TABLE).get_dtype()]

    def block(self, i: int) -> Weights:
        """Read block i, as stored, on the CPU. Names are without the "model.layers.i." in front."""
        return {name: self._read(f"model.layers.{i}.{name}") for name in self.config.block_shapes()}

    def outer(self) -> Weights:
        """Read what is outside the blocks, as stored, on the CPU.

        It is the embedding table, the final norm, and the head unless it is tied.
        """
        weights = {name: self._read(name) for name in self.config.outer_shapes()}
        second_copy = HEAD in self._where and HEAD not in weights
        if second_copy and not torch.equal(self._read(HEAD), weights[TABLE]):
            raise ValueError(f"{self.path}: tie_word_embeddings is true, but lm_head.weight "
                             "differs from model.embed_tokens.weight; set it to false or delete "
                             "lm_head.weight")
        return weights

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of all tensors that the config asks for."""
        return self.config.outer_shapes() | {
            f"model.layers.{i}.{name}": shape for i, width in enumerate(self.config.widths)
            for name, shape in self.config.block_shapes(width).items()}

    def size(self) -> tuple[int, int]:
        """Count the parameters and the bytes that the model uses of the files on disk."""
        parameters = total_bytes = 0
        for name in self.expected():
            tensor = self._slice(name)
            n = math.prod(tensor.get_shape())
            parameters += n
            total_bytes += n * STORED[tensor.get_dtype()].itemsize
        return parameters, total_bytes

    def digest(self) -> str:
        """Return SHA-256, in hex, of the config and of all tensors' first rows.

        It tells checkpoints apart: whoever trains a model changes every row a little. And first
        rows are quickly read.
        """
        sha256 = hashlib.sha256(repr(self.config).encode())
        for name in sorted(self.expected()):
            row = self._slice(name)[:1].contiguous().view(torch.uint8)
            sha256.update(name.encode() + row.numpy().tobytes())
        return sha256.hexdigest()

    def _slice(self, name: str):
        """Return a tensor whose shape and dtype are known, and whose values are not read yet."""
        file, stored = self._where[name]
        return file.get_slice(stored)

    def _read(self, name: str) -> Tensor:
        """Read a tensor. ValueError if that fails."""
        file, stored = self._where[name]
        try:
            return file.get_tensor(stored)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: cannot read {name} ({error})") from None

    def _open(self, filename: str):
        """Open a file of the folder, once. Its header and length are checked here."""
        path = PurePosixPath(filename)
        if path.is_absolute() or ".." in path.parts or "\\" in filename or ":" in filename:
            raise ValueError(f"{self.path}: the index names {filename!r}, "
                             "which is outside the folder")
        if filename not in self._files:
            if not (self.path / path).is_file():
                raise ValueError(f"{self.path}: {filename} is missing; "
                                 "download the checkpoint again")
            refuse_pointer(self.path / path)
            try:
                self._files[filename] = safe_open(self.path / path, framework="pt", device="cpu")
            except PermissionError:
                raise
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / path} is truncated or corrupt ({error}); "
                                 "download it again") from None
        return self._files[filename]

    def _locate(self) -> dict:
        """Map tensor names to (open file, name in it), by the single file or the shards' index."""
        if (self.path / "model.safetensors").is_file():
            file = self._open("model.safetensors")
            return {name: (file, name) for name in sorted(file.keys())}
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            self._refuse_adapter()
            self._refuse_pickles()
            raise ValueError(f"{self.path} is not a checkpoint: neither model.safetensors nor "
                             f"{index.name} is there")
        places = read_json(index).get("weight_map")
        if (not isinstance(places, dict)
                or not all(isinstance(filename, str) for filename in places.values())):
            raise ValueError(f"{index}: weight_map must map tensor names to file names")
        files = {name: self._open(filename) for name, filename in places.items()}
        present = {filename: set(file.keys()) for filename, file in self._files.items()}
        return {name: (file, name) for name, file in files.items()
                if name in present[places[name]]}

    def _refuse_pickles(self) -> None:
        """ValueError if the folder holds pickle files."""
        pickles = sorted(path.name for pattern in PICKLES for path in self.path.glob(pattern))
        if pickles:
            raise ValueError(f"{self.path} holds only pickle files ({pickles[0]}), which can run "
                             "code and are never opened; convert them where you trust them: "
                             f"{CONVERT}")

    def _refuse_adapter(self) -> None:
        """ValueError if the folder holds a LoRA adapter, which is no model of its own."""
        names = ("adapter_config.json", "adapter_model.safetensors")
        if any((self.path / name).is_file() for name in names):
            raise ValueError(f"{self.path} holds an adapter (PEFT, LoRA), not a model; merge it "
                             f"with its model first: {MERGE}, and put the tokenizer's files there")

    def _check_prefix(self) -> None:
        """ValueError if all names begin with something other than "model."."""
        prefixes = {name.removesuffix(FIRST) for name in self._where if name.endswith(FIRST)}
        if not prefixes or "model." in prefixes:
            return
        prefix, names = min(prefixes), some(sorted(self._where))
        what = f"{self.path}: the names of its {len(self._where)} tensors "
        if not prefix:
            advice = (f"put it there: {CONVERT}" if self.config.tie_word_embeddings else
                      "save the whole model, with its head (AutoModelForCausalLM), not its base")
            raise ValueError(f'{what}lack the "model." in front ({names}); {advice}')
        wrapper = prefix.removesuffix("model.")
        inner = next((inner for name, inner in WRAPPERS.items() if name in wrapper),
                     "the model inside")
        raise ValueError(f"{what}have {wrapper!r} in front, a wrapper's ({names}); save {inner} "
                         "with save_pretrained('NEW'), or rename the tensors")

    def _check_tensors(self) -> None:
        """ValueError counts and names missing, unexpected, misshapen and unreadable tensors."""
        self._check_prefix()
        expected, present = self.expected(), self._where.keys()
        shapes, dtypes = {}, {}
        for name in sorted(expected.keys() & present):
            tensor = self._slice(name)
            shapes[name], dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
        missing = expected.keys() - present
        unexpected = {
            name for name in present - expected.keys()
            if name != HEAD                                # the second copy of a tied head
            and not name.endswith("rotary_emb.inv_freq")}  # of old LLaMA files; recomputed here
        misshapen = [f"{name} {shape} instead of {expected[name]}"
                     for name, shape in shapes.items() if shape != expected[name]]
        unreadable = [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in STORED]
        problems = {"missing": sorted(missing), "unexpected": sorted(unexpected),
                    "of the wrong shape": misshapen,
                    f"of a type other than {'/'.join(STORED)}": unreadable}
        report = "; ".join(f"{len(names)} tensors {what}: {some(names)}"
                           for what, names in problems.items() if names)
        if report:
            raise ValueError(f"{self.path}: the files do not hold what config.json describes; "
                             f"{report}")


def some(names: list[str]) -> str:
    """List the names with commas between them. Of a long list these are the first few."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def hub_id(path: Path) -> str | None:
    """Return the ORG/NAME of a folder in the hub's cache. None for any other folder.

    The folder is models--ORG--NAME, or snapshots/HASH in it.
    """
    path = path.resolve()
    name = (path.parents[1] if path.parent.name == "snapshots" else path).name
    return name.removeprefix("models--").replace("--", "/") if name.startswith("models--") else None
