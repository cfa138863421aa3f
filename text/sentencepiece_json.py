"""A sentencepiece model built from a tokenizer.json with byte fallback.

Such a file is a sentencepiece model in another form: it has the pieces, and the order in which
they are merged. A sentencepiece model is a small protobuf, so it can be written here, in memory,
and given to sentencepiece.
"""
import struct
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6       # the kinds of pieces, as the format numbers them
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# behind a model's protobuf, settings that win: no space put in front of a text, none taken out
SPACES_AS_THEY_ARE = b"\x1a\x04\x18\x00\x20\x00"


def sentencepiece_model(path: Path, model: dict, special: set[str]) -> bytes:
    """The protobuf of a sentencepiece BPE model from the "model" part of a tokenizer.json.

    Sentencepiece joins any two neighbours that make a piece, in the order of the pieces' scores.
    ValueError if the merges in the file say something else.
    """
    vocab, unknown = dict(model["vocab"]), model.get("unk_token") or "<unk>"
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{path}: the ids of {len(vocab)} pieces must be 0 to {len(vocab) - 1}; "
                         "put its tokenizer.model beside it")
    if missing := sum(byte not in vocab for byte in BYTES):
        raise ValueError(f"{path}: has byte fallback, but no piece for {missing} of the 256 bytes; "
                         "put its tokenizer.model beside it")
    vocab.setdefault(unknown, len(vocab))  # the format demands one; with all bytes it never occurs
    kinds = dict.fromkeys(vocab, NORMAL) | dict.fromkeys(special & vocab.keys(), CONTROL)
    kinds |= dict.fromkeys(BYTES, BYTE) | {unknown: UNKNOWN}
    scores = merge_scores(path, model, {piece for piece in vocab if kinds[piece] == NORMAL})
    pieces = b"".join(field(1, field(1, piece.encode()) + b"\x15"
                            + struct.pack("<f", scores.get(piece, 0)) + number(3, kinds[piece]))
                      for piece in sorted(vocab, key=vocab.get))
    trainer = number(3, 2) + number(35, 1)            # BPE, with byte fallback
    trainer += number(40, vocab[unknown]) + field(45, unknown.encode())
    return pieces + field(2, trainer) + SPACES_AS_THEY_ARE


def merge_scores(path: Path, model: dict, normal: set[str]) -> dict[str, float]:
    """{piece: score}: minus the place of its first merge. ValueError if sentencepiece would differ.

    It would if the merges to one piece did not stand together, or if two pieces could be joined to
    a third and the file did not list that. Only runs of spaces may be mixed: LLaMA's all have the
    same score.
    """
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
             for merge in model["merges"]]
    places = {}
    for place, (left, right) in enumerate(pairs):
        places.setdefault(left + right, []).append(place)
    scores, before, start, end = {}, "", 0, -1
    for piece, found in places.items():
        if found[0] > end:
            start = found[0]
        elif set(before + piece) != {"▁"}:
            raise ValueError(f"{path}: the merges to {before!r} do not stand together, as those of "
                             "a sentencepiece model do; put its tokenizer.model beside it")
        scores[piece], before, end = -float(start), piece, max(end, found[-1])
    listed = set(pairs)
    for piece in normal:
        for k in range(1, len(piece)):
            if piece[:k] in normal and piece[k:] in normal and (piece[:k], piece[k:]) not in listed:
                raise ValueError(f"{path}: does not merge {piece[:k]!r} and {piece[k:]!r}, which a "
                                 "sentencepiece model would; put its tokenizer.model beside it")
    return scores


def varint(value: int) -> bytes:
    """A number in protobuf's form: seven bits a byte, the lowest first."""
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def number(key: int, value: int) -> bytes:
    """A protobuf field that holds a number."""
    return varint(key << 3) + varint(value)


def field(key: int, content: bytes) -> bytes:
    """A protobuf field that holds bytes: text, or other fields."""
    return varint(key << 3 | 2) + varint(len(content)) + content
