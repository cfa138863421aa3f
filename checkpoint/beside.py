"""The files beside the weights of a result: copied from its source, or written anew."""
import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import sentencepiece

from checkpoint.config import WIDE, read_json

COPIED = ("tokenizer*", "*.tiktoken", "tekken.json", "vocab.json", "merges.txt",
          "added_tokens.json", "special_tokens_map.json", "chat_template*",
          "additional_chat_templates/*.jinja", "generation_config.json",
          "license*", "licence*", "notice*", "use_policy*")  # in upper or lower case

CARD = """\
---
{yaml}
---

# {name} with {blocks} blocks

{name} made shallower: neighbouring blocks are joined, or some are left out.
The license of {name} holds.

{facts}

{load}

`flatten.json` records the whole run.
"""
LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/folder")
tokenizer = AutoTokenizer.from_pretrained("this/folder")  # a tokenizer.model needs protobuf, too
```"""
LOAD_WIDE = ("Its blocks are wider than a library expects: `python flatten.py --ckpt this/folder` "
             "makes them ordinary.")


def copy_beside(source: Path, folder: Path) -> None:
    """Copy tokenizer, templates and licenses.

    No code is copied, nor auto_map, which would ask for code. A sentencepiece model without a
    tokenizer_config.json gets one.
    """
    for path in sorted([*source.glob("*"), *source.glob("additional_chat_templates/*")]):
        name = path.relative_to(source)
        wanted = any(fnmatchcase(name.as_posix().lower(), pattern) for pattern in COPIED)
        if wanted and path.is_file() and path.suffix != ".py":
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)  # follows a link
    path, model = folder / "tokenizer_config.json", folder / "tokenizer.model"
    alone = not (folder / "tokenizer.json").is_file() and model.is_file()
    if path.is_file():
        if (settings := read_json(path)).pop("auto_map", None):
            write_json(path, settings)
    elif alone and (data := model.read_bytes())[:1] == b"\n":  # as a sentencepiece model begins
        named = (folder / "special_tokens_map.json").is_file()
        write_json(path, tokenizer_config(data, named))


def tokenizer_config(model: bytes, named: bool = False) -> dict:
    """Make a tokenizer_config.json of what a sentencepiece model says of itself.

    Without that file transformers adds no BOS. `named`: another file names the special tokens.
    """
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    bos, eos, unk = tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unk} if not named else {}
    space = "".join(tokenizer.encode_as_pieces("x")).startswith("▁")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": bos >= 0,
              "add_eos_token": False, "add_prefix_space": space, "legacy": False}
    if tokenizer.decode(tokenizer.encode("a  b")) != "a  b":
        config["sentencepiece_normalizes"] = True  # for our reader; LlamaTokenizer cannot do it
    return config | {name: tokenizer.id_to_piece(i) for name, i in names.items() if i >= 0}


def model_card(name: str, config: dict, record: dict) -> str:
    """Make the README.md of a result from its config.json and its record.

    `name` is the source's name.
    """
    wide = config["model_type"] == WIDE
    about = {"base_model": record.get("base_model"),
             "library_name": None if wide else "transformers",
             "pipeline_tag": "text-generation", "tags": ["flattengpt", "depth-compression"]}
    joined = ["+".join(map(str, group["blocks"]))
              for group in record.get("groups", []) if len(group["blocks"]) > 1]
    before, after = record["parameters_before"], record["parameters_after"]
    asked = f" (asked: {record['ratio_asked']})" if "ratio_asked" in record else ""
    facts = {"method": record.get("method"), "parameters": f"{before:,} before, {after:,} after",
             "ratio": f"{record['ratio_reached']:.4f} of all parameters removed{asked}",
             "one block in place of": ", ".join(joined),
             "then trained": ", then ".join(f"on {run['tokens']:,} tokens of {run['text']}"
                                            for run in record.get("recovery", [])),
             "command": f"`{record['command']}`" if "command" in record else None}
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in about.items() if value)
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items() if value)
    return CARD.format(yaml=yaml, name=name, blocks=config["num_hidden_layers"], facts=listed,
                       load=LOAD_WIDE if wide else LOAD)


def write_json(path: Path, data: dict) -> None:
    """Write readable JSON, with the keys in the order given."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
