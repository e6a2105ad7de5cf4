"""CLIP's ids beside the real open_clip and transformers, on text of any kind."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import open_clip_module

from fastclip.data.tokenizer import Tokenizer, clip_tokenizer, get_tokenizer

pytestmark = pytest.mark.peer

SPECIAL = ("start_of_text", "end_of_text")  # spelled out they are special for open_clip, and text for us
HARD = [
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "Z\u0351\u036b\u0343a\u0308\u0304l\u0334g\u0337o\u0321",
    "&amp;lt;b&amp;gt; &#769; &#x1F600; &notit; &nbsp;|&amp",
    "e&#769; \u0345\u0399 \u1fb3 \u01c5 \ufb03 \u017f '\u017f 'S 'LL",
    "nul\x00nul \x1b[31mred\x1b[0m \x1c\x1d\x1e\x1f \x85 \u2028 \u200b \ufeff",
    "\u0130stanbul \u00df \u1e9e \u039f\u03b4\u03c5\u03c3\u03c3\u03b5\u03cd\u03a3 \u212a\u212b",
    "\ud83d lone \udc00 surrogates".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
    "sch\u00c3\u00b6n \u00e2\u20ac\u2122 \uff21\uff22\uff23 \uff9e \u3099",
    "\u0e01\u0e33 \u1100\u1161\u11a8 \ud55c \u0958 \u2126",
    "don't we'll I'm you've he'd '' 's''s",
    "x" * 3000,
    "a1b2 " * 500,
    "\u4e2d" * 2000,
    "   \t\n\r\x0b\x0c ",
]
words = st.lists(
    st.one_of(
        st.sampled_from(HARD),
        st.text(max_size=12),
        st.text(st.characters(categories=["L", "M", "N", "P", "S", "Z"]), max_size=12),
        st.text(st.characters(max_codepoint=127), max_size=20),
        st.sampled_from(["&amp;", "&lt;", "&eacute;", "&#39;", "\u00e2\u20ac\u0153", "'s", "'LL", " ", "\n", "0", "a"]),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return open_clip_module("open_clip.tokenizer").SimpleTokenizer()


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return clip_tokenizer()


def assert_same(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode(text) == theirs.encode(text), repr(text)
    for length in (5, 77):
        assert torch.equal(ours(text, length), theirs(text, length)), repr(text)


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert_same(ours, theirs, text)


@settings(max_examples=examples(400), deadline=None)
@given(parts=words, glue=st.sampled_from(["", " "]))
def test_any_text(ours: Tokenizer, theirs: Any, parts: list[str], glue: str) -> None:
    text = glue.join(parts)
    if not any(name in text.lower() for name in SPECIAL):
        assert_same(ours, theirs, text)


@pytest.mark.long
@settings(max_examples=examples(2000), deadline=None)
@given(parts=words, glue=st.sampled_from(["", " "]))
def test_much_text(ours: Tokenizer, theirs: Any, parts: list[str], glue: str) -> None:
    text = glue.join(parts)
    if not any(name in text.lower() for name in SPECIAL):
        assert_same(ours, theirs, text)


@pytest.mark.long
def test_every_character_of_unicode(ours: Tokenizer, theirs: Any) -> None:
    """All of the planes that hold any; of the others, which hold none or private ones, a part."""
    whole, empty = (*range(0x40000), *range(0xE0000, 0xF0000)), (*range(0x40000, 0xE0000), *range(0xF0000, 0x110000))
    for first in (*whole[::64], *empty[::4096]):
        known = [chr(c) for c in range(first, first + 64) if not 0xD800 <= c < 0xE000]
        text = " ".join(f"{c}a 'x{c}{c}1.{c}" for c in known)
        assert ours.encode(text) == theirs.encode(text), hex(first)


def test_a_hundred_thousand_characters_take_no_time(ours: Tokenizer) -> None:
    start = time.perf_counter()
    for text in ("a photo of a dog. " * 5556, "x" * 100_000, "\u4e2d" * 100_000, "&amp;" * 20_000):
        assert ours(text)[0, -1] == ours.eot_token_id or ours(text).max() == ours.eot_token_id
    assert time.perf_counter() - start < 5


def test_a_vocabulary_from_transformers_is_the_same(ours: Tokenizer, theirs: Any, tmp_path: Path) -> None:
    ours.save(tmp_path / "tokenizer.json")
    again = get_tokenizer(tmp_path)
    for text in HARD:
        assert again.encode(text) == theirs.encode(text)


@pytest.mark.alone
def test_it_is_faster_than_open_clips(ours: Tokenizer, theirs: Any) -> None:
    """Half of the ratio that `python -m benchmarks.data` measures: other tests run beside this one."""
    draw = random.Random(0)
    known = "a photo of the red dog cat running on grass beach holding ball with blue sky lake kitchen women's"
    plain = [" ".join(draw.choice(known.split()) for _ in range(12)) for _ in range(1000)]
    odd = [f"{text} caf\u00e9 &amp; \u201cbar\u201d" for text in plain]
    for texts, least in ((plain, 1.75), (odd, 0.8)):
        times: dict[Any, list[float]] = {ours: [], theirs: []}
        for _ in range(5):
            for tokenizer, spent in times.items():
                start = time.perf_counter()
                tokenizer(texts)
                spent.append(time.perf_counter() - start)
        assert min(times[theirs]) / min(times[ours]) > least
