"""CLIP's byte-level BPE: the vocabulary, and a caption to ids by words that are remembered.

Ids are open_clip's and OpenAI's on any Unicode text by construction: the cleaning is ftfy's, the words are those of the
same `regex` pattern, and a word that was not seen yet goes through the `tokenizers` library's BPE. Printable ASCII
without an ampersand needs no cleaning, and has a pattern that knows only ASCII.
"""

import functools
import gzip
import html
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

SOT, EOT = "<start_of_text>", "<end_of_text>"
CLIP_VOCAB_SIZE = 49408
CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
END_OF_WORD = "</w>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_ASCII_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+")
_REMEMBERED = 1 << 17  # words
_LONG = 64  # letters of a word that is not worth remembering


def byte_letters() -> list[str]:
    """The printable letter of each byte, in the order of GPT-2's and CLIP's vocabularies."""
    return list(_letter_of().values())


@functools.cache
def _letter_of() -> dict[int, str]:
    """Byte to letter, printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@functools.cache
def _unicode_words():
    import regex

    return regex.compile(CLIP_WORDS, regex.IGNORECASE)


def mend(text: str) -> str:
    """open_clip's first cleaning: mojibake mended, HTML escapes undone twice."""
    from ftfy import fix_text

    return html.unescape(html.unescape(fix_text(text)))


class ClipBpe:
    """Ids of captions by the BPE `rust`, whose vocabulary is CLIP's."""

    def __init__(self, rust: "RustTokenizer") -> None:
        self._model = rust.model
        self._ids: dict[str, tuple[int, ...]] = {}

    def ids(self, text: str, most: int | None = None) -> list[int]:
        """The ids of `text`; all of them, or at least `most` + 1 where there are so many."""
        known, found = self._ids, list[int]()
        for word in self._words(text):
            ids = known.get(word)
            found += self._learn(word) if ids is None else ids
            if most is not None and len(found) > most:
                break
        return found

    def _words(self, text: str) -> Iterator[str] | list[str]:
        if text.isascii() and text.isprintable() and "&" not in text:
            return _ASCII_WORDS.findall(text.lower())
        cleaned = " ".join(mend(text).split()).lower()
        return (match[0] for match in _unicode_words().finditer(cleaned))

    def _learn(self, word: str) -> tuple[int, ...]:
        letters = _letter_of()
        # a lone surrogate, which UTF-8 has no bytes for, becomes the replacement character's
        content = word.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
        ids = tuple(token.id for token in self._model.tokenize("".join(letters[byte] for byte in content)))
        if len(word) <= _LONG:
            if len(self._ids) >= _REMEMBERED:
                self._ids.clear()
            self._ids[word] = ids
        return ids


def clip_merges(vocabulary: Path) -> list[tuple[str, str]]:
    """The merges of CLIP's vocabulary file. Errors: `FileNotFoundError`; `ValueError` for another file."""
    try:
        with gzip.open(vocabulary, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : CLIP_VOCAB_SIZE - 514 + 1]
        return [(left, right) for left, right in (line.split() for line in lines)]
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"tokenizer: {vocabulary} is not CLIP's vocabulary {CLIP_FILE} ({error})") from error
