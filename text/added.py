"""Added tokens: texts with an id of their own, which are cut out before anything else is done.

`<s>`, `<|im_start|>` and `<think>` are such tokens. Each says by flags how it wants to be found.
"""
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# what Unicode calls white space
SPACES = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"


@dataclass(frozen=True)
class Added:
    """One added token."""
    id: int
    special: bool = True        # left out when ids are printed
    lstrip: bool = False        # swallows the white space before it
    rstrip: bool = False        # swallows the white space after it
    single_word: bool = False   # not found inside a word
    normalized: bool = False    # looked for in the normalized text, not in the text as given


Piece = tuple[int, "str | Added"]  # where it starts, and the token or the text between tokens


def added_token(content: object, i: object, flags: dict) -> Added:
    """An Added from what a file says of it; ValueError if that makes no sense."""
    if not isinstance(content, str) or not content or type(i) is not int or not 0 <= i < 2**31:
        raise ValueError(f"added tokens need a text and an id; got {content!r}: {i!r}")
    names = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return Added(i, **{name: bool(flags[name]) for name in names if name in flags})


def splitter(tokens: dict[str, Added],
             normalize: Callable[[str], str]) -> Callable[[str], list[Piece]]:
    """A function that cuts a text into added tokens and the normalized text between them.

    Tokens that are not `normalized` come first. What lies between them is normalized, and cut
    again at those that are.
    """
    as_given = {text: token for text, token in tokens.items() if not token.normalized}
    after = {normalize(text): token for text, token in tokens.items() if token.normalized}

    def split(text: str) -> list[Piece]:
        pieces = []
        for start, piece in cut(text, as_given, first):
            if isinstance(piece, Added):
                pieces.append((start, piece))
            else:
                pieces += [(start + k, part) for k, part in cut(normalize(piece), after, second)]
        return pieces
    first, second = (one_of(group) for group in (as_given, after))
    return split


def one_of(texts: dict[str, Added]) -> re.Pattern:
    """An expression that matches any of the texts, the longest first; never, if there is none."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def cut(text: str, tokens: dict[str, Added], any_token: re.Pattern) -> Iterator[Piece]:
    """The tokens in a text, and the texts between them that are not empty."""
    done = 0
    for match in any_token.finditer(text):
        token, start, end = tokens[match[0]], match.start(), match.end()
        if token.single_word and (in_word(text[start - 1:start]) or in_word(text[end:end + 1])):
            continue
        if token.lstrip:
            while start > done and re.fullmatch(SPACES, text[start - 1]):
                start -= 1
        if token.rstrip:
            end = re.compile(SPACES).match(text, end).end()
        if done < start:
            yield done, text[done:start]
        yield start, token
        done = end
    if done < len(text):
        yield done, text[done:]


def in_word(char: str) -> bool:
    """Whether a character can be a part of a word: a letter, mark, digit or connector like _."""
    kind = unicodedata.category(char) if char else ""
    return kind[:1] in ("L", "M") or kind in ("Nd", "Nl", "Pc")
