"""Text <-> token ids, exactly as the checkpoint's authors do it, from the vocabulary files it has.

Two algorithms cover every LLaMA and Qwen: sentencepiece, and byte-level BPE run by tiktoken. Their
files come in several costumes (tokenizer.model, a list of base64 ranks, tokenizer.json, vocab.json
and merges.txt), which are told apart by content. What stands around the algorithm is the same for
all: added tokens are cut out first (text/added.py), BOS may be put in front (bos_habit), and bytes
are put together to a text again (Tokenizer.decode).
"""
import base64
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tiktoken

from checkpoint.config import WIDE, read_json, refuse_pointer
from text.added import Added, added_token, splitter
from text.sentencepiece_json import SPACES_AS_THEY_ARE, sentencepiece_model

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA3 = (ENDINGS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# every digit alone, then GPT-2's rule between them: a run of spaces before a digit ends there
GPT2_DIGITS = (r"\p{N}|" + GPT2.replace(r"| ?\p{N}+", "")
               .replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)"))
LONGEST_RUN = 900_000  # characters of white space; at a million tiktoken's expressions overflow


@dataclass
class Tokenizer:
    """encode and decode, the added tokens, and whether a text starts with BOS."""
    encode_plain: Callable[[str, bool], list[int]]  # of a text between added tokens; is it first?
    normalize: Callable[[str], str]
    added: dict[str, Added]
    token_bytes: dict[int, bytes]                   # the text of every other id
    bos_id: int | None
    add_bos: bool
    drops_space: bool = False   # decode leaves out the space that encode puts in front of a text

    def __post_init__(self):
        self.split = splitter(self.added, self.normalize)
        self.vocab_size = max([*self.token_bytes, *(token.id for token in self.added.values())]) + 1
        self.special = {token.id for token in self.added.values() if token.special} | {self.bos_id}
        self.texts = dict(self.token_bytes)
        for text, token in self.added.items():
            found = self.normalize(text).replace("▁", " ") if token.normalized else text
            self.texts[token.id] = found.encode()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with BOS in front if that is the habit; added tokens become their ids."""
        ids = [self.bos_id] if self.add_bos else []
        for start, piece in self.split(text):
            ids += [piece.id] if isinstance(piece, Added) else self.encode_plain(piece, start == 0)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens and ids that the vocabulary does not have."""
        shown = [self.texts.get(i, b"") for i in ids if i not in self.special]
        text = b"".join(shown).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.drops_space else text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; ValueError says what is missing or not supported."""
    try:
        return read_tokenizer(Path(folder))
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        # JSON of another form than any known
        raise ValueError(f"{folder}: its tokenizer files are malformed "
                         f"({type(error).__name__}: {error})") from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """load_tokenizer, for files of the known forms."""
    settings = {}
    for name in ("tokenizer_config", "special_tokens_map", "added_tokens", "tokenizer", "config"):
        path = folder / f"{name}.json"
        settings[name] = read_json(path) if path.is_file() else {}
    if settings["config"].get("model_type") == WIDE:
        settings["config"]["model_type"] = settings["config"].get("base_model_type", "")
    models = [folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken"))]
    for path in filter(Path.is_file, models):
        refuse_pointer(path)
        data = path.read_bytes()
        if data[:1] == b"\n":                          # the first field of a sentencepiece protobuf
            return from_sentencepiece(path, data, settings)
        return from_tiktoken(path, data, settings)
    if settings["tokenizer"]:
        return from_tokenizer_json(folder / "tokenizer.json", settings)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return from_vocab_and_merges(folder, settings)
    raise ValueError(f"{folder} has no tokenizer; expected tokenizer.model, *.tiktoken, "
                     "tokenizer.json, or vocab.json and merges.txt beside the weights")


def from_sentencepiece(path: Path, data: bytes, settings: dict) -> Tokenizer:
    """LLaMA 1/2, Mistral, TinyLlama: `data` is a sentencepiece model, in its protobuf form.

    Where only tokenizer.model is there, it decides: sentencepiece normalizes a text in its own way,
    and BOS is added if the model has one. Other files decide as they do in transformers. The two
    agree on LLaMA's models, and a text that starts with a space gets no second one in either.
    """
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        spaceless = sentencepiece.SentencePieceProcessor(model_proto=data + SPACES_AS_THEY_ARE)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model ({error})") from None
    ids = range(model.vocab_size())
    hidden = [i for i in ids if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)]
    pieces = {i: model.id_to_piece(i) for i in ids if i not in hidden and not model.is_byte(i)}
    token_bytes = {i: piece.replace("▁", " ").encode() for i, piece in pieces.items()}
    token_bytes |= {i: bytes([int(model.id_to_piece(i)[3:5], 16)]) for i in ids if model.is_byte(i)}
    unknown = named_tokens(settings).get("unk_token", model.id_to_piece(model.unk_id()))
    own = {model.id_to_piece(i): Added(i) for i in hidden
           if model.is_control(i) or model.id_to_piece(i) == unknown}
    added = added_tokens(settings, own, {model.id_to_piece(i): i for i in ids})
    # plain pieces that stand alone in any text are found by sentencepiece itself
    added = {text: token for text, token in added.items() if not (
        token == Added(token.id, special=False, normalized=token.normalized)
        and pieces.get(token.id) == text and sum(text in piece for piece in pieces.values()) == 1)}
    space = space_in_front(settings)
    if space == "model":
        in_front = model.encode("x") != spaceless.encode("x")
        plain = model.encode("x  y") == spaceless.encode("▁x  y")  # no normalizing of its own
        space = "first" if plain else "once" if in_front else "never"

    def encode(text: str, is_first: bool) -> list[int]:
        if space == "once":
            return (model if is_first else spaceless).encode(text)
        if space == "always" or (space == "first" and is_first):
            text = text if text.startswith("▁") else "▁" + text.removeprefix(" ")
        return spaceless.encode(text)
    normalize = {"everywhere": lambda text: "▁" + text.replace(" ", "▁"),
                 "nowhere": lambda text: text.replace(" ", "▁")}.get(space, str)
    bos = model.bos_id() if model.bos_id() >= 0 else None
    bare = not settings["tokenizer_config"] and bos is not None
    decoder = steps(settings["tokenizer"].get("decoder"), "decoders")
    drops = (any(step.get("type") == "Strip" for step in decoder)
             if space in ("everywhere", "nowhere") else space != "never")
    return Tokenizer(encode, normalize, added, token_bytes, *bos_habit(settings, added, bos, bare),
                     drops_space=drops)


def space_in_front(settings: dict) -> str:
    """Where sentencepiece's text gets a space in front, by the files beside the model.

    "model": as the model file says: there are no others, or they leave it to the model. "first",
    "always": the text, or every text between added tokens, unless it starts with a space. "never".
    "everywhere", "nowhere": a normalizer of tokenizer.json does it, before tokens marked
    `normalized` are looked for.
    """
    config, data = settings["tokenizer_config"], settings["tokenizer"]
    if (not config and not data) or config.get("sentencepiece_normalizes"):
        return "model"
    generic = transformers_class(settings) != "LlamaTokenizer"
    if generic and (data.get("model") or {}).get("byte_fallback"):
        found = [*steps(data.get("normalizer"), "normalizers"),
                 *steps(data.get("pre_tokenizer"), "pretokenizers")]
        kinds = [step.get("type") for step in found]
        if kinds == ["Metaspace"] and found[0].get("split") is False:
            given = "always" if found[0].get("add_prefix_space", True) else "never"
            return found[0].get("prepend_scheme", given)
        if kinds in (["Replace"], ["Prepend", "Replace"]):
            return "nowhere" if len(kinds) == 1 else "everywhere"
        raise ValueError(f"tokenizer.json: {' + '.join(map(str, kinds)) or None} with byte "
                         "fallback is not supported, only Replace or a Metaspace without split")
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def from_tiktoken(path: Path, data: bytes, settings: dict) -> Tokenizer:
    """LLaMA-3's or Qwen-1's list of ranks; special tokens, not in it, follow the last rank."""
    try:
        pairs = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise ValueError(f"{path} is neither a sentencepiece model nor a list of tiktoken ranks "
                         f"({error})") from None
    if len(ranks) == 128000:
        named = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(4)),
                 "start_header_id", "end_header_id", "reserved_special_token_4", "eot_id",
                 *(f"reserved_special_token_{i}" for i in range(5, 251))]
        pattern, normalize, bos = LLAMA3, None, 128000
    elif len(ranks) == 151643:
        named = ["endoftext", "im_start", "im_end", *(f"extra_{i}" for i in range(205))]
        pattern, normalize, bos = QWEN, "NFC", None
    else:
        raise ValueError(f"{path} has {len(ranks)} ranks; known are LLaMA-3's 128000 and Qwen's "
                         "151643")
    added = added_tokens(settings, {}, {})
    taken = {token.id for token in added.values()}
    own = {f"<|{name}|>": Added(len(ranks) + i) for i, name in enumerate(named)}
    added = {text: token for text, token in own.items() if token.id not in taken} | added
    return byte_level(path, ranks, {i: token for token, i in ranks.items()}, pattern, normalize,
                      False, added, *bos_habit(settings, added, bos, bos is not None))


def from_tokenizer_json(path: Path, settings: dict) -> Tokenizer:
    """One JSON file: byte-level BPE (LLaMA-3, Qwen, SmolLM), or sentencepiece's in that form."""
    data = settings["tokenizer"]
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"{path} holds {model.get('type')}, not BPE; put the sentencepiece "
                         "tokenizer.model beside it")
    added = added_tokens(settings, {}, model.get("vocab", {}))
    if model.get("byte_fallback"):
        hidden = {text for text, token in added.items() if token.special and not token.normalized}
        return from_sentencepiece(path, sentencepiece_model(path, model, hidden), settings)
    normalizers = [step.get("type") for step in steps(data.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise ValueError(f"{path}: normalizer {' + '.join(map(str, normalizers))} is not "
                         "supported, only NFC or none")
    pattern, space = split_pattern(path, data.get("pre_tokenizer"))
    merges = [merge.split(" ") if isinstance(merge, str) else merge
              for merge in model.get("merges", [])]
    ranks, token_bytes = merge_ranks(path, model.get("vocab", {}), merges, added,
                                     keep_all=bool(model.get("ignore_merges")))
    if model.get("unk_token") and any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{path}: an unk_token for bytes that have no token is not supported")
    if transformers_class(settings) in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        # these two classes go by the config, the generic one by tokenizer.json
        space = settings["tokenizer_config"].get("add_prefix_space")
    return byte_level(path, ranks, token_bytes, pattern, "NFC" if normalizers else None, space,
                      added, *bos_habit(settings, added, None, False))


def from_vocab_and_merges(folder: Path, settings: dict) -> Tokenizer:
    """Qwen's (or GPT-2's) vocab.json and merges.txt; the class says how text is split."""
    kind = transformers_class(settings) or settings["config"].get("model_type", "")
    if kind.startswith(("Qwen2", "qwen2", "qwen3")):
        pattern, normalize = QWEN, "NFC"
    elif kind.startswith("GPT2"):
        pattern, normalize = GPT2, None
    else:
        raise ValueError(f"{folder}: how a {kind or 'tokenizer of unknown class'} splits text is "
                         "not known; put its tokenizer.json there")
    refuse_pointer(folder / "merges.txt")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines
              if line.strip() and not line.startswith("#version")]
    vocab = read_json(folder / "vocab.json")
    end = vocab.get("<|endoftext|>")  # special without being named; GPT-2's BOS
    own = {} if end is None else {"<|endoftext|>": added_token("<|endoftext|>", end, {})}
    added = added_tokens(settings, own, vocab)
    ranks, token_bytes = merge_ranks(folder / "merges.txt", vocab, merges, added)
    return byte_level(folder, ranks, token_bytes, pattern, normalize,
                      settings["tokenizer_config"].get("add_prefix_space"), added,
                      *bos_habit(settings, added, end if pattern == GPT2 else None, False))


def byte_level(path: Path, ranks: dict[bytes, int], token_bytes: dict[int, bytes], pattern: str,
               normalize: str | None, space: bool, added: dict[str, Added],
               bos_id: int | None, add_bos: bool) -> Tokenizer:
    """A Tokenizer that runs byte-level BPE in tiktoken.

    It splits by `pattern`, then merges the pair of lowest rank first. `space`: a text that does not
    start with a space gets one. A byte without a token vanishes from the ids.
    """
    if space and pattern != GPT2:
        raise ValueError(f"{path}: add_prefix_space goes with GPT-2's way to split text only")
    end = max(token_bytes, default=-1) + 1
    missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
    try:  # tiktoken wants all bytes: those without a token get ids that are taken out again
        encoding = tiktoken.Encoding(
            str(path), pat_str=pattern, special_tokens={},
            mergeable_ranks=ranks | {byte: end + i for i, byte in enumerate(missing)})
    except Exception as error:  # tiktoken raises bare Exceptions of several kinds
        raise ValueError(f"{path}: not a usable byte-level BPE vocabulary ({error})") from None

    lost = vanishing(missing)

    def encode(text: str, is_first: bool) -> list[int]:
        text = lost.sub("", " " + text if space and not text.startswith(" ") else text)
        if any(run.end() - run.start() > LONGEST_RUN for run in re.finditer(r"\s\s+", text)):
            raise ValueError(f"the text has a run of more than {LONGEST_RUN} spaces or line breaks,"
                             " too long for this tokenizer; shorten it")
        ids = encoding.encode_ordinary(text)
        return [i for i in ids if i < end] if missing else ids
    form = (lambda text: unicodedata.normalize(normalize, text)) if normalize else str
    return Tokenizer(encode, form, added, token_bytes, bos_id, add_bos)


def vanishing(missing: list[bytes]) -> re.Pattern:
    """An expression for characters without a token that are to be taken out before words are cut.

    That lets their neighbours be merged, as in `tokenizers`. It is right only between two signs of
    one word (neither letter, digit nor white space), or between the space of a word and its first
    sign: elsewhere the character separates words and has to stay until they are cut.
    """
    sign = r"[^\w\s]|[_\x1c-\x1f]"  # the last four are no white space to tiktoken
    found = [byte.decode() for byte in missing if byte < b"\x80" and re.match(sign, byte.decode())]
    any_of = "[" + "".join(map(re.escape, found)) + "]+" if found else r"(?!)"
    return re.compile(f"(?<= |{sign}){any_of}(?={sign})")


def merge_ranks(path: Path, vocab: dict[str, int], merges: list[list[str]],
                added: dict[str, Added], keep_all: bool = False
                ) -> tuple[dict[bytes, int], dict[int, bytes]]:
    """({bytes: id} of the tokens that tiktoken may make, {id: bytes} of all in the vocabulary).

    tiktoken merges in the order of ids, so ValueError unless the merges come in that order. Tokens
    that no merge makes can never be produced and are left out of the former, unless `keep_all`
    ("ignore_merges": a whole word is looked up first).
    """
    if len(set(vocab.values())) != len(vocab) or not all(
            type(i) is int and 0 <= i < 2**31 for i in vocab.values()):
        raise ValueError(f"{path}: ids of tokens must be different integers")
    byte_of = byte_alphabet()
    known = {token: i for token, i in vocab.items() if token and byte_of.keys() >= set(token)}
    if letters := [token for token in vocab if token not in known and token not in added]:
        raise ValueError(f"{path}: a BPE over letters as they are (for example {letters[0]!r}), "
                         "not over bytes; not supported")
    try:
        made = [(vocab[left], vocab[right], vocab[left + right])[2] for left, right in merges]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a usable byte-level BPE vocabulary ({error})") from None
    if made != sorted(made):
        raise ValueError(f"{path}: not a usable byte-level BPE vocabulary (its merges are not in "
                         "the order of their ids)")
    token_bytes = {i: bytes(byte_of[char] for char in token) for token, i in known.items()}
    usable = known.values() if keep_all else {i for token, i in known.items() if len(token) == 1}
    usable = set(usable) | set(made)
    return {token: i for i, token in token_bytes.items() if i in usable}, token_bytes


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in vocab.json.

    It is the byte's own if that is printable, else one from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return ({chr(byte): byte for byte in printable}
            | {chr(256 + i): byte for i, byte in enumerate(others)})


def split_pattern(path: Path, pre: dict | None) -> tuple[str, bool]:
    """(the expression by which a pre_tokenizer cuts text into words, add_prefix_space)."""
    found = steps(pre, "pretokenizers")
    kinds = [step.get("type") for step in found]
    if "ByteLevel" not in kinds:
        raise ValueError(f"{path} holds a BPE over letters as they are, not over bytes (its "
                         f"pre_tokenizer is {' + '.join(map(str, kinds)) or None}); not supported")
    first, last = found[0], found[-1]
    own_regex, space = last.get("use_regex", True), bool(last.get("add_prefix_space", True))
    pattern = (first.get("pattern") or {}).get("Regex")
    whole = (first.get("behavior"), first.get("invert")) in (("Isolated", False), ("Removed", True))
    if kinds == ["ByteLevel"] and own_regex:
        return GPT2, space
    if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits") and own_regex:
        return GPT2_DIGITS, space
    if kinds == ["Split", "ByteLevel"] and pattern and whole and not own_regex:
        return pattern, space
    raise ValueError(f"{path}: pre_tokenizer {' + '.join(map(str, kinds))} is not supported, only "
                     "Split + ByteLevel, Digits + ByteLevel or ByteLevel")


def steps(part: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer, pre_tokenizer or post_processor: those of a Sequence, or one."""
    if part and part.get("type") == "Sequence":
        return part[key]
    return [part] if part else []


def transformers_class(settings: dict) -> str:
    """The class of transformers that reads this folder; "" if the generic one, or none, is named.

    The generic class takes tokenizer.json as it is; so do models of Mistral's family, always.
    """
    named = (settings["tokenizer_config"].get("tokenizer_class")
             or settings["config"].get("tokenizer_class") or "").removesuffix("Fast")
    family = settings["config"].get("model_type", "")
    mistral = family.startswith(("mistral", "mixtral", "ministral"))
    return "" if mistral or named in ("PreTrainedTokenizer", "TokenizersBackend") else named


def added_tokens(settings: dict, own: dict[str, Added], vocab: dict[str, int]) -> dict[str, Added]:
    """All added tokens, from the places where they stand; the later win.

    These are: the vocabulary's own, tokenizer.json, added_tokens_decoder of tokenizer_config.json
    or else added_tokens.json, and the named ones (bos_token...) if the vocabulary has them.
    """
    config, named = settings["tokenizer_config"], named_tokens(settings)
    tokens = dict(own)
    listed = [(entry["content"], entry["id"], entry)
              for entry in settings["tokenizer"].get("added_tokens") or []]
    if "added_tokens_decoder" in config:
        listed += [(entry["content"], int(i), entry)
                   for i, entry in (config["added_tokens_decoder"] or {}).items()]
    else:
        listed += [(text, i, {}) for text, i in settings["added_tokens"].items()]
    for text, i, flags in listed:
        special = bool(flags.get("special")) or text in named.values()
        flags = {"normalized": not special} | flags | {"special": special}
        tokens[text] = added_token(text, i, flags)
    for text in named.values():
        if text in vocab and text not in tokens:
            tokens[text] = added_token(text, vocab[text], {})
    return tokens


def named_tokens(settings: dict) -> dict[str, str]:
    """{"bos_token": "<s>", ...} and further special tokens under numbers.

    special_tokens_map.json counts, and before tokenizer_config.json, unless the latter has
    added_tokens_decoder.
    """
    config = settings["tokenizer_config"]
    if "added_tokens_decoder" not in config:
        config = config | settings["special_tokens_map"]
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = dict(enumerate(more.values() if isinstance(more, dict) else more))
    values |= {name: token for name, token in config.items()
               if name.endswith("_token") and isinstance(token, (str, dict))}
    texts = {name: token["content"] if isinstance(token, dict) else token
             for name, token in values.items()}
    return {name: text for name, text in texts.items() if text}


def bos_habit(settings: dict, added: dict[str, Added], bos_id: int | None,
              default: bool) -> tuple[int | None, bool]:
    """(BOS id, whether a text starts with it), decided as transformers 5 does.

    Where there is a tokenizer.json, its template decides alone: its first token is put in front.
    Elsewhere add_bos_token of tokenizer_config.json decides, and if it is not there, `default`.
    BOS is the token that is named so, else the `bos_id` of the vocabulary.
    """
    if name := named_tokens(settings).get("bos_token"):
        bos_id = added[name].id if name in added else None
    if settings["tokenizer"]:
        for step in steps(settings["tokenizer"].get("post_processor"), "processors"):
            if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
                first = step["special_tokens"][step["single"][0]["SpecialToken"]["id"]]["ids"][0]
                return added_token("BOS", first, {}).id, True
        return bos_id, False
    explicit = settings["tokenizer_config"].get("add_bos_token")
    return bos_id, bool(default if explicit is None else explicit) and bos_id is not None
