"""Captions to token ids: CLIP's BPE from open_clip's vocabulary file, or any `tokenizers` JSON, or one trained here.

Ids are CLIP's: start of text, the caption, end of text, zeros. The end-of-text id is the largest of the vocabulary, so
`ids.argmax(-1)` finds the pooled token and `argmax + 1` the length.
"""

import difflib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastclip.data.clip_bpe import (
    CLIP_FILE,
    CLIP_VOCAB_SIZE,
    CLIP_WORDS,
    END_OF_WORD,
    EOT,
    SOT,
    ClipBpe,
    byte_letters,
    clip_merges,
    mend,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

_SOT_NAMES, _EOT_NAMES = (SOT, "<|startoftext|>"), (EOT, "<|endoftext|>")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
CLIP_NAMES = ("clip", "RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14")
CLIP_CONTEXT_LENGTH = 77


class Tokenizer:
    """Tokenize captions for a text tower: `tokenizer(texts, context_length=None) -> int64 (B, context_length)`.

    A caption that is too long keeps its end-of-text token. Special tokens spelled out in a caption are plain text.
    A `tokenizers` JSON that has not CLIP's start and end tokens frames a caption by its own template (BERT's, T5's),
    and pads with its own padding: `ends_with_largest_id` says whether a tower may pool at `ids.argmax(-1)`.
    """

    def __init__(self, rust: "RustTokenizer", context_length: int) -> None:
        sot = next((i for name in _SOT_NAMES if (i := rust.token_to_id(name)) is not None), None)
        eot = next((i for name in _EOT_NAMES if (i := rust.token_to_id(name)) is not None), None)
        self.vocab_size = rust.get_vocab_size(with_added_tokens=True)
        self.pad_token_id = 0
        rust.no_truncation()
        rust.no_padding()
        is_clips = sot is not None and eot is not None
        if sot is None or eot is None:
            head, tail = _template(rust)
            eot = tail[-1]
            self.pad_token_id = next((i for name in _PAD_NAMES if (i := rust.token_to_id(name)) is not None), 0)
        elif eot == self.vocab_size - 1:
            head, tail = [sot], [eot]
        else:
            raise ValueError(f"tokenizer: the end token has id {eot}; it must be the largest id, {self.vocab_size - 1}")
        if context_length < 1 + len(head) + len(tail):
            raise ValueError(f"context_length: must be at least {1 + len(head) + len(tail)}, was {context_length}")
        rust.encode_special_tokens = True
        self._head, self._tail = head, tail
        self.sot_token_id, self.eot_token_id = head[0] if head else None, eot
        self.ends_with_largest_id = eot == self.vocab_size - 1
        self.context_length = context_length
        self._rust = rust
        self._encode = self._encoder(is_clips)

    def _encoder(self, is_clips: bool) -> Callable[[str, int | None], list[int]]:
        """From a text and how many ids are of interest to its ids."""
        rust = self._rust
        if self.vocab_size == CLIP_VOCAB_SIZE and getattr(rust.model, "end_of_word_suffix", None) == END_OF_WORD:
            return ClipBpe(rust).ids
        if is_clips:
            return lambda text, most: rust.encode(text, add_special_tokens=False).ids
        return lambda text, most: rust.encode(" ".join(mend(text).split()), add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no start, no end, not cut."""
        return self._encode(text, None)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first end token; zeros, start and end are left out."""
        kept = []
        for i in ids:
            if int(i) == self.eot_token_id:
                break
            if int(i) != self.sot_token_id:
                kept.append(int(i))
        return self._rust.decode(kept).strip()

    def batch(self, texts: list[str], context_length: int | None = None) -> tuple[Tensor, int]:
        """Ids int64 (B, context_length) and how many captions were cut."""
        length = context_length or self.context_length
        out = torch.full((len(texts), length), self.pad_token_id, dtype=torch.int64)
        head, tail = self._head, self._tail
        most, cut = length - len(head) - len(tail), 0
        for row, text in zip(out.numpy(), texts, strict=True):
            ids = self._encode(text, most)
            if len(ids) > most:
                cut, ids = cut + 1, ids[:most]
            ids = [*head, *ids, *tail]
            row[: len(ids)] = ids
        return out, cut

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        return self.batch([texts] if isinstance(texts, str) else list(texts), context_length)[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_text, (self._rust.to_str(), self.context_length)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `tokenizers` JSON that `get_tokenizer` reads back, context length included."""
        self._rust.enable_truncation(self.context_length)
        try:
            self._rust.save(os.fspath(path))
        finally:
            self._rust.no_truncation()


def _template(rust: "RustTokenizer") -> tuple[list[int], list[int]]:
    """The special ids before and behind a text. Errors: `ValueError` where nothing marks its end."""
    framed = rust.encode("a", add_special_tokens=True)
    special = framed.special_tokens_mask
    inner = [place for place, is_special in enumerate(special) if not is_special]
    if not inner or inner[-1] == len(special) - 1:
        raise ValueError(
            f"tokenizer: has no start and end token; it must have {_SOT_NAMES} and {_EOT_NAMES}, "
            "or a template that adds a token behind a text"
        )
    return framed.ids[: inner[0]], framed.ids[inner[-1] + 1 :]


def _pipeline(model) -> "RustTokenizer":
    """`model` behind CLIP's text handling: NFC, lower case, one space, split into words, numerals and signs, bytes."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as RustTokenizer

    rust = RustTokenizer(model)
    rust.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # U+0120 is the letter of the byte "space"
    rust.decoder = decoders.Sequence([decoders.Replace(END_OF_WORD, "\u0120"), decoders.ByteLevel()])
    return rust


def _bpe(merges: list[tuple[str, str]]) -> "RustTokenizer":
    """CLIP's byte-level BPE with these merges; ids: 256 bytes, 256 bytes that end a word, merges, start, end."""
    from tokenizers import AddedToken, models

    letters = byte_letters()
    words = [*letters, *(letter + END_OF_WORD for letter in letters), *(a + b for a, b in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    rust = _pipeline(models.BPE(vocab, merges, end_of_word_suffix=END_OF_WORD))
    rust.add_special_tokens([AddedToken(SOT, special=True), AddedToken(EOT, special=True)])
    return rust


def clip_tokenizer(vocabulary: str | os.PathLike[str] | None = None, context_length: int | None = None) -> Tokenizer:
    """CLIP's tokenizer (49,408 ids) from `bpe_simple_vocab_16e6.txt.gz`: the given one, or that of an installed
    open_clip (the file only: open_clip is not imported).

    Ids are open_clip's on any text, but for special tokens spelled out in it. Needs ftfy and regex, as open_clip does.
    Errors: `FileNotFoundError` where there is neither, `ValueError` for a file that is another one.
    """
    if vocabulary is None:
        spec = importlib.util.find_spec("open_clip")
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"tokenizer: {CLIP_FILE} (CLIP's vocabulary) is missing; pip install open_clip_torch, or give its path"
            )
        vocabulary = Path(spec.origin).with_name(CLIP_FILE)
    merges = clip_merges(Path(vocabulary))
    return Tokenizer(_bpe(merges), context_length or CLIP_CONTEXT_LENGTH)


def train_tokenizer(
    captions: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int = 1024,
    context_length: int = CLIP_CONTEXT_LENGTH,
) -> Tokenizer:
    """Learn CLIP's kind of BPE from `captions` and save it at `path`. At most `vocab_size` ids, 514 of them for bytes,
    start and end; the same captions give the same file."""
    from tokenizers import models, trainers

    if vocab_size < 514:
        raise ValueError(f"vocab_size: must be at least 514 (bytes twice, start, end), was {vocab_size}")
    rust = _pipeline(models.BPE(end_of_word_suffix=END_OF_WORD))
    # Pairs of equal count are merged in the order of their letters' ids. Only special tokens get theirs in a fixed
    # order: the trainer numbers an alphabet, and the letters that end a word, as its hash table happens to hold them.
    letters = [letter + end for end in ("", END_OF_WORD) for letter in byte_letters()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=letters, end_of_word_suffix=END_OF_WORD, show_progress=False
    )
    rust.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(rust.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(_bpe(merges[: vocab_size - 514]), context_length)
    tokenizer.save(path)
    return tokenizer


def get_tokenizer(name_or_path: str | os.PathLike[str], context_length: int | None = None) -> Tokenizer:
    """The tokenizer of an open_clip model name ("ViT-B-16": CLIP's BPE), of a `tokenizers` JSON, of a folder with a
    `tokenizer.json`, or of CLIP's vocabulary file.

    `context_length` (tokens, start and end included) overrides the one that comes with it. Errors: `FileNotFoundError`
    for a path that is not there, `ValueError` for an unknown name or a file that is no tokenizer.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return clip_tokenizer(path, context_length) if path.suffix == ".gz" else _from_json(path, context_length)
    name = os.fspath(name_or_path)
    if name in CLIP_NAMES:
        return clip_tokenizer(None, context_length)
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"tokenizer: {path} does not exist")
    near = difflib.get_close_matches(name, CLIP_NAMES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"tokenizer: {name!r} is neither a file nor one of {', '.join(CLIP_NAMES)}{hint}")


def _from_text(content: str, context_length: int) -> Tokenizer:
    from tokenizers import Tokenizer as RustTokenizer

    return Tokenizer(RustTokenizer.from_str(content), context_length)


def _from_json(path: Path, context_length: int | None) -> Tokenizer:
    from tokenizers import Tokenizer as RustTokenizer

    try:
        rust = RustTokenizer.from_file(os.fspath(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"tokenizer: {path} is not a tokenizers JSON ({error})") from error
    saved = (rust.truncation or {}).get("max_length")
    return Tokenizer(rust, context_length or saved or CLIP_CONTEXT_LENGTH)
