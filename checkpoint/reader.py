"""Read a checkpoint folder in Hugging Face layout, lazily, block by block, from safetensors files only.

Tensors come as views of the memory-mapped file: a model larger than memory costs the block being looked at.
"""
import math
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.config import WIDE, Config, read_json, refuse_pointer

Weights = dict[str, Tensor]  # checkpoint name -> tensor; inside a block without the "model.layers.N." in front
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHOWN = 4  # names of a long list
CONVERT = ("python -c \"from transformers import AutoModelForCausalLM as M; "
           "M.from_pretrained('OLD').save_pretrained('NEW')\"")
MERGE = ("python -c \"from peft import AutoPeftModelForCausalLM as M; "
         "M.from_pretrained('OLD').merge_and_unload().save_pretrained('NEW')\"")
FIRST = "layers.0.input_layernorm.weight"  # in every model; what stands before it is all names' prefix
WRAPPERS = {"_orig_mod.": "model._orig_mod", "module.": "model.module",
            "base_model.": "model.merge_and_unload()"}


class Checkpoint:
    """A checkpoint folder whose config, files, names, shapes and dtypes have been checked; no tensor is read yet.

    Errors are ValueErrors of one line: not a checkpoint, unsupported wiring (which field), a missing or corrupt file,
    and how many tensors are missing, unexpected and misshapen, all at once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            what = "not a" if self.path.exists() else "no such"
            raise ValueError(f"{path!s:.200}: {what} folder; expected one with config.json and *.safetensors files")
        if not (self.path / "config.json").is_file():
            self._refuse_adapter()
            raise ValueError(f"{path} is not a checkpoint: it has no config.json")
        self.hub_id = hub_id(self.path)
        self.name = (self.hub_id or self.path.resolve().name).split("/")[-1]  # for outputs, tables
        self.raw = read_json(self.path / "config.json")
        self.config = Config.read(self.path)
        self.is_wide = self.raw.get("model_type") == WIDE
        self._files = {}
        self._where = self._locate()                  # tensor name -> open file, name in that file
        if self.config.tie_word_embeddings and HEAD in self._where and TABLE not in self._where:
            self._where[TABLE] = self._where.pop(HEAD)  # two names for one tensor: some keep this
        self._check_tensors()
        self.dtype = DTYPES[self._slice(TABLE).get_dtype()]

    def block(self, i: int) -> Weights:
        """Block i's tensors under their names inside the block ("self_attn.q_proj.weight"), on the CPU, as stored."""
        return {name: self._read(f"model.layers.{i}.{name}") for name in self.config.block_shapes()}

    def outer(self) -> Weights:
        """The tensors outside the blocks (embeddings, final norm, head unless tied), on the CPU, as stored."""
        weights = {name: self._read(name) for name in self.config.outer_shapes()}
        second_copy = HEAD in self._where and HEAD not in weights
        if second_copy and not torch.equal(self._read(HEAD), weights[TABLE]):
            raise ValueError(f"{self.path}: tie_word_embeddings is true, but lm_head.weight differs from "
                             "model.embed_tokens.weight; set it to false or delete lm_head.weight")
        return weights

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that this config asks for."""
        return self.config.outer_shapes() | {
            f"model.layers.{i}.{name}": shape for i, width in enumerate(self.config.widths)
            for name, shape in self.config.block_shapes(width).items()}

    def size(self) -> tuple[int, int]:
        """(parameters, bytes) of the tensors on disk that the model uses, counted from the files."""
        counts = [(math.prod(piece.get_shape()), DTYPES[piece.get_dtype()].itemsize)
                  for name in self.expected() for piece in [self._slice(name)]]
        return sum(n for n, _ in counts), sum(n * width for n, width in counts)

    def _slice(self, name: str):
        """A tensor whose shape and dtype are known, and whose values are not read yet."""
        file, stored = self._where[name]
        return file.get_slice(stored)

    def _read(self, name: str) -> Tensor:
        file, stored = self._where[name]
        try:
            return file.get_tensor(stored)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: cannot read {name} ({error})") from None

    def _open(self, filename: str):
        """An opened file of the folder; its header and length are checked here."""
        path = PurePosixPath(filename)
        if path.is_absolute() or ".." in path.parts or "\\" in filename or ":" in filename:
            raise ValueError(f"{self.path}: the index names {filename!r}, which is outside the folder")
        if filename not in self._files:
            if not (self.path / path).is_file():
                raise ValueError(f"{self.path}: {filename} is missing; download the checkpoint again")
            refuse_pointer(self.path / path)  # and an OSError says so if it may not be read
            try:
                self._files[filename] = safe_open(self.path / path, framework="pt", device="cpu")
            except PermissionError:
                raise
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / path} is truncated or corrupt ({error}); download it again") from None
        return self._files[filename]

    def _locate(self) -> dict:
        """Tensor name -> (open file, name), from the single file or the index of the shards."""
        if (self.path / "model.safetensors").is_file():
            file = self._open("model.safetensors")
            return {name: (file, name) for name in sorted(file.keys())}
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            self._refuse_adapter()
            pickles = sorted(p.name for pattern in PICKLES for p in self.path.glob(pattern))
            if pickles:
                raise ValueError(
                    f"{self.path} holds only pickle files ({pickles[0]}), which can run code and are never opened; convert "
                    f"them where you trust them: {CONVERT}")
            raise ValueError(f"{self.path} is not a checkpoint: neither model.safetensors nor {index.name} is there")
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index}: weight_map must map tensor names to file names")
        where = {name: self._open(file) for name, file in places.items()}
        present = {name: set(file.keys()) for name, file in self._files.items()}
        return {name: (file, name) for name, file in where.items() if name in present[places[name]]}

    def _refuse_adapter(self) -> None:
        """ValueError if the folder holds a LoRA adapter, a difference from a model and not one."""
        names = ("adapter_config.json", "adapter_model.safetensors")
        if any((self.path / name).is_file() for name in names):
            raise ValueError(f"{self.path} holds an adapter (PEFT, LoRA), not a model; merge it with its "
                             f"model first: {MERGE}, and put the tokenizer's files there")

    def _check_prefix(self) -> None:
        """ValueError if all names have something other than "model." in front."""
        prefixes = {name.removesuffix(FIRST) for name in self._where if name.endswith(FIRST)}
        if not prefixes or "model." in prefixes:
            return
        prefix, names = min(prefixes), some(sorted(self._where))
        what = f"{self.path}: the names of its {len(self._where)} tensors "
        if not prefix:
            save = f"put it there: {CONVERT}" if self.config.tie_word_embeddings else \
                "save the whole model, with its head (AutoModelForCausalLM), not its base"
            raise ValueError(f'{what}lack the "model." in front ({names}); {save}')
        foreign = prefix.removesuffix("model.")
        inner = [inner for name, inner in WRAPPERS.items() if name in foreign] or ["the model inside"]
        raise ValueError(f"{what}have {foreign!r} in front, a wrapper's ({names}); save {inner[0]} "
                         "with save_pretrained('NEW'), or rename the tensors")

    def _check_tensors(self) -> None:
        """ValueError that counts and names missing, unexpected, misshapen and unreadable tensors."""
        self._check_prefix()
        expected, found = self.expected(), self._where
        harmless = {name for name in found if name.endswith("rotary_emb.inv_freq")}  # old LLaMA files; recomputed here
        harmless |= {HEAD} & (found.keys() - expected.keys())                        # a second copy of a tied head
        problems = [("missing", sorted(expected.keys() - found.keys())),
                    ("unexpected", sorted(found.keys() - expected.keys() - harmless))]
        slices = {name: self._slice(name) for name in sorted(expected.keys() & found.keys())}
        problems.append(("of the wrong shape", [f"{name} {tuple(s.get_shape())} instead of {expected[name]}"
                                                for name, s in slices.items() if tuple(s.get_shape()) != expected[name]]))
        problems.append((f"of a type other than {'/'.join(DTYPES)}", [f"{name} {s.get_dtype()}" for name, s in slices.items()
                                                                     if s.get_dtype() not in DTYPES]))
        if report := [f"{len(names)} tensors {what}: {some(names)}" for what, names in problems if names]:
            raise ValueError(f"{self.path}: the files do not hold what config.json describes; {'; '.join(report)}")


def some(names: list[str]) -> str:
    """The names with commas between; of a long list the first few."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def hub_id(path: Path) -> str | None:
    """ORG/NAME of a folder in the hub's cache: models--ORG--NAME, or snapshots/HASH in it."""
    path = path.resolve()
    name = (path.parents[1] if path.parent.name == "snapshots" else path).name
    return name.removeprefix("models--").replace("--", "/") if name.startswith("models--") else None
