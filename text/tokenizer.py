"""Text <-> token ids, exactly as the checkpoint's authors do it, from whichever vocabulary files its folder holds.

Two algorithms cover every LLaMA and Qwen: sentencepiece, and byte-level BPE run by tiktoken. The latter comes in three
costumes (a list of base64 ranks, tokenizer.json, vocab.json + merges.txt), which are told apart by content.
"""
import base64
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tiktoken

from checkpoint.config import read_json

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA3 = ENDINGS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# every digit alone, then GPT-2's rule between them: a run of spaces before a digit ends there
GPT2_DIGITS = r"\p{N}|" + GPT2.replace(r"| ?\p{N}+", "").replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")


@dataclass
class Tokenizer:
    """encode and decode, the special tokens, and whether a text starts with BOS."""
    encode_plain: Callable[[str], list[int]]   # a text without special tokens
    decode_plain: Callable[[list[int]], str]   # ids without special tokens
    specials: dict[str, int]
    bos_id: int | None
    add_bos: bool
    vocab_size: int                            # largest id + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text, BOS in front if that is this tokenizer's habit; special tokens in the text become their ids."""
        ids = [self.bos_id] if self.add_bos else []
        longest_first = sorted(self.specials, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if self.specials else [text]
        for piece in pieces:
            if piece:
                ids += [self.specials[piece]] if piece in self.specials else self.encode_plain(piece)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens, and ids that the vocabulary does not have, are left out."""
        special = set(self.specials.values()) | {self.bos_id}
        return self.decode_plain([i for i in ids if i not in special and i < self.vocab_size])


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; ValueError says which files are missing or what is not supported."""
    try:
        return read_tokenizer(Path(folder))
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:  # JSON of another form than any known
        raise ValueError(f"{folder}: its tokenizer files are malformed ({type(error).__name__}: {error})") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """load_tokenizer, for files of the known forms."""
    settings = {name: read_json(folder / f"{name}.json") if (folder / f"{name}.json").is_file() else {}
                for name in ("tokenizer_config", "added_tokens", "tokenizer", "config")}
    models = [folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken"))]
    for path in filter(Path.is_file, models):
        data = path.read_bytes()
        if data[:1] == b"\n":                          # the first field of a sentencepiece protobuf
            return from_sentencepiece(path, settings)
        return from_tiktoken(path, data, settings)
    if settings["tokenizer"]:
        return from_tokenizer_json(folder / "tokenizer.json", settings)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return from_vocab_and_merges(folder, settings)
    raise ValueError(f"{folder} has no tokenizer; expected tokenizer.model, *.tiktoken, tokenizer.json, "
                     "or vocab.json and merges.txt beside the weights")


def from_sentencepiece(path: Path, settings: dict) -> Tokenizer:
    """LLaMA 1/2, Mistral, TinyLlama. Without settings of its own, the model file decides: it has BOS, so BOS is added."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model ({error})") from None
    specials = added_tokens(settings)
    bos = model.bos_id() if model.bos_id() >= 0 else None
    return Tokenizer(model.encode, model.decode, specials, *bos_habit(settings, specials, bos, bos is not None),
                     vocab_size=max([model.vocab_size() - 1, *specials.values()]) + 1)


def from_tiktoken(path: Path, data: bytes, settings: dict) -> Tokenizer:
    """LLaMA-3's or Qwen-1's list of ranks; the special tokens, which are not in the file, follow the last rank."""
    try:
        pairs = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise ValueError(f"{path} is neither a sentencepiece model nor a list of tiktoken ranks ({error})") from None
    if len(ranks) == 128000:
        named = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(4)), "start_header_id",
                 "end_header_id", "reserved_special_token_4", "eot_id"]
        named += [f"reserved_special_token_{i}" for i in range(5, 251)]
        pattern, normalize, bos = LLAMA3, None, 128000
    elif len(ranks) == 151643:
        named = ["endoftext", "im_start", "im_end", *(f"extra_{i}" for i in range(205))]
        pattern, normalize, bos = QWEN, "NFC", None
    else:
        raise ValueError(f"{path} has {len(ranks)} ranks; known are LLaMA-3's 128000 and Qwen's 151643")
    specials = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(named)}
    given = added_tokens(settings)
    specials = {name: i for name, i in specials.items() if i not in given.values()} | given
    return byte_level(path, ranks, pattern, normalize, specials, *bos_habit(settings, specials, bos, bos is not None))


def from_tokenizer_json(path: Path, settings: dict) -> Tokenizer:
    """LLaMA-3, Qwen, SmolLM and other byte-level BPE in one JSON file."""
    data = settings["tokenizer"]
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"{path} holds {model.get('type')}{' with byte fallback' if model.get('byte_fallback') else ''}, "
                         "not byte-level BPE; put the sentencepiece tokenizer.model beside it")
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"{path}: normalizer {normalizer} is not supported, only NFC or none")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    specials = added_tokens(settings)
    ranks = merge_ranks(path, model.get("vocab", {}), merges, specials, keep_all=bool(model.get("ignore_merges")))
    return byte_level(path, ranks, split_pattern(path, data.get("pre_tokenizer")), normalizer, specials,
                      *bos_habit(settings, specials, None, False))


def from_vocab_and_merges(folder: Path, settings: dict) -> Tokenizer:
    """Qwen's (or GPT-2's) vocab.json and merges.txt; how text is split follows from the tokenizer class."""
    kind = settings["tokenizer_config"].get("tokenizer_class") or settings["config"].get("model_type", "")
    if kind.startswith(("Qwen2", "qwen2", "qwen3")):
        pattern, normalize = QWEN, "NFC"
    elif kind.startswith("GPT2"):
        pattern, normalize = GPT2, None
    else:
        raise ValueError(f"{folder}: how a {kind or 'tokenizer of unknown class'} splits text is not known; "
                         "put its tokenizer.json there")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    specials = added_tokens(settings)
    ranks = merge_ranks(folder / "merges.txt", read_json(folder / "vocab.json"), merges, specials)
    return byte_level(folder, ranks, pattern, normalize, specials, *bos_habit(settings, specials, None, False))


def byte_level(path: Path, ranks: dict[bytes, int], pattern: str, normalize: str | None, specials: dict[str, int],
               bos_id: int | None, add_bos: bool) -> Tokenizer:
    """A Tokenizer that runs byte-level BPE in tiktoken: split by `pattern`, then merge the pair of lowest rank first."""
    ids = set(ranks.values())
    if len(ids) != len(ranks) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"{path}: ids of tokens must be different integers")
    # tiktoken wants all 256 bytes; those that the vocabulary lacks get ids above it, which encode leaves out
    size = max([*ids, *specials.values()]) + 1
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    padded = ranks | {bytes([byte]): size + k for k, byte in enumerate(missing)}
    try:
        encoding = tiktoken.Encoding(str(path), pat_str=pattern, mergeable_ranks=padded, special_tokens={})
    except Exception as error:  # tiktoken raises bare Exceptions of several kinds
        raise ValueError(f"{path}: not a usable byte-level BPE vocabulary ({error})") from None
    def encode(text: str) -> list[int]:
        found = encoding.encode_ordinary(unicodedata.normalize(normalize, text) if normalize else text)
        return [i for i in found if i < size] if missing else found

    def decode(tokens: list[int]) -> str:
        return encoding.decode([i for i in tokens if i in ids], errors="replace")
    return Tokenizer(encode, decode, specials, bos_id, add_bos, size)


def merge_ranks(path: Path, vocab: dict[str, int], merges: list[list[str]], specials: dict[str, int],
                keep_all: bool = False) -> dict[bytes, int]:
    """{token bytes: id} from a vocabulary in the printable byte alphabet and its merges.

    tiktoken merges in the order of ids, so ValueError unless the merges come in that order. Tokens that no merge makes
    can never be produced and are left out, unless `keep_all` ("ignore_merges": a whole word is looked up first).
    """
    byte_of = byte_alphabet()
    try:
        made = [vocab[left + right] for left, right in merges]
        if made != sorted(made):
            raise ValueError("its merges are not in the order of their ids")
        reachable = set(made)
        return {bytes(byte_of[char] for char in token): i for token, i in vocab.items()
                if (len(token) == 1 or keep_all or i in reachable) and token not in specials}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a usable byte-level BPE vocabulary ({error})") from None


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in vocab.json: itself if printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def split_pattern(path: Path, pre: dict | None) -> str:
    """The regular expression by which the pre_tokenizer of a tokenizer.json cuts text into words."""
    steps = pre["pretokenizers"] if pre and pre.get("type") == "Sequence" else [pre or {}]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
        own_regex, first = last.get("use_regex", True), steps[0]
        pattern = (first.get("pattern") or {}).get("Regex")
        if len(steps) == 1 and own_regex:
            return GPT2
        if len(steps) == 2 and first["type"] == "Digits" and first.get("individual_digits") and own_regex:
            return GPT2_DIGITS
        whole = (first.get("behavior"), first.get("invert")) in (("Isolated", False), ("Removed", True))
        if len(steps) == 2 and first["type"] == "Split" and pattern and whole and not own_regex:
            return pattern
    raise ValueError(f"{path}: pre_tokenizer {' + '.join(str(step.get('type')) for step in steps)} is not supported, only "
                     "Split + ByteLevel, Digits + ByteLevel or ByteLevel, without add_prefix_space")


def added_tokens(settings: dict) -> dict[str, int]:
    """{token: id} of all tokens that are cut out of a text before anything else, from the three places they stand in."""
    tokens = dict(settings["added_tokens"])
    tokens |= {entry["content"]: int(i)
               for i, entry in (settings["tokenizer_config"].get("added_tokens_decoder") or {}).items()}
    tokens |= {entry["content"]: entry["id"] for entry in settings["tokenizer"].get("added_tokens") or []}
    for name, i in tokens.items():
        if not isinstance(name, str) or not name or type(i) is not int or not 0 <= i < 2**31:
            raise ValueError(f"added tokens need a text and an id; got {name!r}: {i!r}")
    return tokens


def bos_habit(settings: dict, specials: dict[str, int], bos_id: int | None, default: bool) -> tuple[int | None, bool]:
    """(BOS id, whether a text starts with it).

    An explicit add_bos_token decides; else the template in tokenizer.json; else `default`, the habit of the kind of file.
    """
    config, post = settings["tokenizer_config"], settings["tokenizer"].get("post_processor") or {}
    templates = [step for step in post.get("processors", [post]) if step.get("type") == "TemplateProcessing"]
    front = [piece["SpecialToken"]["id"] for step in templates for piece in step["single"][:1] if "SpecialToken" in piece]
    named = config.get("bos_token") or (front[0] if front else None)
    named = named["content"] if isinstance(named, dict) else named
    bos_id = specials.get(named, bos_id)
    explicit = config.get("add_bos_token")
    add = explicit if isinstance(explicit, bool) else bool(front) if settings["tokenizer"] else default
    return bos_id, add and bos_id is not None
