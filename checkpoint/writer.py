"""Write a checkpoint folder block by block. It appears under its name complete, or not at all."""
import contextlib
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

import parallel
from checkpoint.beside import copy_beside, model_card, write_json
from checkpoint.config import WIDE, read_json
from checkpoint.reader import Checkpoint, Weights

SHARD = 16 * 2**20  # bytes of a file, at least; a block of a large model is a file of its own
NAMES = ("auto_map", "_name_or_path", "_model_name_or_path")  # of code and folders left behind


class Writer:
    """Builds a checkpoint folder: `with Writer(out, source) as writer:`.

    The folder is built beside `out`, and writer.finish(...) puts it in place. Without finish (after
    an error or Ctrl-C) nothing is left. What can be known to fail later, such as an existing output
    or a full disk, is a ValueError at the start. Of several processes the first alone writes.
    """

    def __init__(self, out: str | Path, source: Checkpoint, overwrite: bool = False):
        self.out, self.source, self.overwrite = Path(out), source, overwrite
        check_output(self.out, source.path, overwrite)
        self.pending, self.pending_bytes, self.shards, self.blocks = {}, 0, [], 0

    def __enter__(self) -> "Writer":
        if parallel.rank():
            return self
        self.made = [path for path in self.out.parents if not path.exists()]
        disk = next(path for path in self.out.absolute().parents if path.exists())
        need, free = self.source.size()[1], shutil.disk_usage(disk).free
        if free < need:
            raise ValueError(f"the disk of {self.out} has {free / 1e9:.2f} GB free and the result "
                             f"may need {need / 1e9:.2f} GB; free some or choose another --out")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{self.out.name}.partial-", dir=self.out.parent)
        self.folder = Path(folder)
        return self

    def __exit__(self, *error) -> None:
        if parallel.rank():
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already if finish renamed it
        for path in self.made:
            with contextlib.suppress(OSError):          # not empty: the result is in it
                path.rmdir()

    def add(self, block: Weights) -> None:
        """Append a block, whose tensors have their names inside a block."""
        if parallel.rank():
            return
        self._collect({f"model.layers.{self.blocks}.{name}": tensor
                       for name, tensor in block.items()})
        self.blocks += 1

    def finish(self, groups: list[list[int]], record: dict, wide: bool = False,
               changes: dict | None = None, outer: Weights | None = None) -> dict:
        """Write what surrounds the blocks and move the folder in place. Returns the full record.

        groups[k] are the source's blocks that became block k. The counted sizes are added to
        `record`, which is written as flatten.json. If it names a dense model already, because the
        source itself is a result, that stays. `changes` are other fields for config.json, `outer`
        the tensors outside the blocks if they are not the source's.
        """
        if parallel.rank():
            parallel.total(0)  # waits for the first process to finish
            return read_json(self.out / "flatten.json")
        self._collect(outer or self.source.outer())
        self._flush()
        self._name_shards()
        config = new_config(self.source, groups, wide) | (changes or {})
        write_json(self.folder / "config.json", config)
        copy_beside(self.source.path, self.folder)
        record = {"source": self.source.name, "source_sha256": self.source.digest(),
                  "parameters_before": self.source.size()[0]} | record
        before, after = record["parameters_before"], Checkpoint(self.folder).size()[0]
        record |= {"parameters_after": after, "ratio_reached": round(1 - after / before, 6)}
        if self.source.hub_id:
            record["base_model"] = self.source.hub_id
        write_json(self.folder / "flatten.json", record)
        card = model_card(record["source"], config, record)
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        mode = (self.folder / "config.json").stat().st_mode & 0o666
        for path in [self.folder, *self.folder.rglob("*")]:
            # safetensors and mkdtemp write for the owner only; config.json has the usual rights
            path.chmod(mode | (mode >> 2 & 0o111 if path.is_dir() else 0))
        publish(self.folder, self.out, self.overwrite)
        parallel.total(0)
        return record

    def _collect(self, tensors: Weights) -> None:
        """Keep tensors for the next file, and write it if it is large enough."""
        self.pending |= tensors
        self.pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.pending_bytes >= SHARD:
            self._flush()

    def _flush(self) -> None:
        """Write the collected tensors to a file."""
        if self.pending:
            path = self.folder / f"shard-{len(self.shards):05d}.safetensors"
            tensors = {name: tensor.contiguous() for name, tensor in self.pending.items()}
            try:
                save_file(tensors, path, {"format": "pt"})
            except SafetensorError as error:  # a full disk, most likely
                raise OSError(f"cannot write {self.out}: {error}") from None
            self.shards.append((path, {name: tensor.nbytes for name, tensor in tensors.items()}))
        self.pending, self.pending_bytes = {}, 0

    def _name_shards(self) -> None:
        """Give the files their names, which hold their number. Write the index of several."""
        total = len(self.shards)
        if total == 1:
            self.shards[0][0].rename(self.folder / "model.safetensors")
            return
        places, size = {}, 0
        for k, (path, tensors) in enumerate(self.shards, 1):
            name = f"model-{k:05d}-of-{total:05d}.safetensors"
            path.rename(self.folder / name)
            places |= dict.fromkeys(tensors, name)
            size += sum(tensors.values())
        write_json(self.folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def new_config(source: Checkpoint, groups: list[list[int]], wide: bool) -> dict:
    """Make the result's config.json: the source's, with the new number of blocks.

    Of lists with an entry for each block, the entry of each group's first block stays. Code that
    the config names (auto_map) is not copied, so the name goes, too. A wide checkpoint gets a
    model_type of its own, so that no library takes it for an ordinary one.
    """
    config = dict(source.raw)
    config["num_hidden_layers"] = len(groups)
    firsts = [group[0] for group in groups]
    for field in ("layer_types", "no_rope_layers"):
        if isinstance(config.get(field), list):
            config[field] = [config[field][first] for first in firsts]
    full = config.get("max_window_layers")  # the number of blocks, from the first, with no window
    if isinstance(full, int):
        config["max_window_layers"] = sum(first < full for first in firsts)
    for field in ("block_widths", "base_model_type", "base_architectures", *NAMES):
        config.pop(field, None)
    if wide:
        config |= {"model_type": WIDE, "base_model_type": source.raw["model_type"],
                   "architectures": ["FlattenedWide"],
                   "base_architectures": source.raw.get("architectures"),
                   "block_widths": [len(group) for group in groups]}
    elif source.is_wide:
        config |= {"model_type": source.raw["base_model_type"],
                   "architectures": source.raw.get("base_architectures")}
    return config


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """ValueError unless `out` may be written.

    It must lie apart from the source. It must be new, or empty or an earlier result that may be
    replaced.
    """
    try:
        here, there = out.resolve(), source.resolve()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"--out {out} cannot be used ({error})") from None
    if here == there or there in here.parents or here in there.parents:
        raise ValueError(f"--out {out} and the checkpoint {source} overlap; "
                         "choose a folder apart from it")
    above = next((folder for folder in here.parents if folder.exists()), here)
    if not above.is_dir():
        raise ValueError(f"{out} cannot be made, because {above} is not a folder; choose another "
                         "place")
    if not out.exists() and not out.is_symlink():
        return
    is_folder = out.is_dir() and not out.is_symlink()
    if not is_folder or (any(out.iterdir()) and not (out / "flatten.json").is_file()):
        raise ValueError(f"{out} exists and is not a result of this program (no flatten.json); "
                         "choose another --out")
    if not overwrite:
        raise ValueError(f"{out} exists already; choose another --out, or replace it with "
                         "--overwrite")


def publish(folder: Path, out: Path, overwrite: bool) -> None:
    """Move the complete folder to its final name. What it replaces is removed at the very end.

    If that fails, the earlier result goes back, or stays in a hidden folder beside it.
    """
    if not overwrite or not out.exists():
        if out.exists():
            raise ValueError(f"{out} appeared while this was running; it is left as it is")
        folder.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        out.rename(old / out.name)
        folder.rename(out)
    except BaseException:
        if (old / out.name).exists() and not out.exists():
            (old / out.name).rename(out)
        with contextlib.suppress(OSError):
            old.rmdir()  # only if it is empty
        raise
    shutil.rmtree(old, ignore_errors=True)
