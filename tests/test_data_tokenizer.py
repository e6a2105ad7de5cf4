"""Tokenizers: CLIP's ids, the largest id at the end, truncation that keeps it, and files that are no tokenizer."""

from __future__ import annotations

import json
import pickle
import unicodedata
from pathlib import Path

import pytest
import torch
from data_helpers import WORDS, examples, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import open_clip_module

from fastclip.data.tokenizer import Tokenizer, clip_tokenizer, get_tokenizer, train_tokenizer

PHRASES = [
    "a diagram",
    "A Photo of  a CAT, isn't it? It's the dog's!",
    "tabs\tand\nlines   and spaces ",
    "numbers 1234 and 3.14, signs #@!?& (ok)",
    "caf\u00e9 na\u00efve \u00fcber \u0130stanbul",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 here",
    "fish &amp;amp; chips &lt;3",
    "<b>black &amp;amp; white</b>",
    "\u201ccurly\u201d \u2018quotes\u2019 \u2026 \ufb01ne \uff21\uff22",
    "mojibake: sch\u00c3\u00b6n",
    "e\u0301 decomposed",
    "",
    "word " * 100,
    "\u039f\u03b4\u03c5\u03c3\u03c3\u03b5\u03cd\u03a3 \u03a3",  # final sigma
]


@pytest.fixture
def small(tmp_path: Path) -> Tokenizer:
    return small_tokenizer(tmp_path)


def test_ids_are_start_words_end_zeros(small: Tokenizer) -> None:
    ids = small(["red circle", "a"], context_length=6)
    start, end = small.sot_token_id, small.eot_token_id
    assert ids.dtype == torch.int64
    red, circle, a = (small.encode(word)[0] for word in ("red", "circle", "a"))
    assert ids.tolist() == [[start, red, circle, end, 0, 0], [start, a, end, 0, 0, 0]]
    assert torch.equal(small("red circle", context_length=6), ids[:1])
    assert small([]).shape == (0, 16)


def test_words_it_was_trained_on_are_one_token_each(small: Tokenizer) -> None:
    assert all(len(small.encode(word)) == 1 for word in WORDS)
    assert small.encode("Red,  GREEN") == small.encode("red") + small.encode(",") + small.encode("green")


@settings(max_examples=examples(200), deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_ends_with_the_largest_id_once(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    tokenizer = small_tokenizer(tmp_path_factory.getbasetemp())
    (ids,) = tokenizer([text], context_length=8).tolist()
    end = tokenizer.eot_token_id
    assert end == tokenizer.vocab_size - 1 == max(ids)
    assert ids.count(end) == 1
    assert ids[0] == tokenizer.sot_token_id
    assert all(i == 0 for i in ids[ids.index(end) + 1 :])


def test_truncation_keeps_the_end_and_is_counted(small: Tokenizer) -> None:
    ids, cut = small.batch(["red " * 30, "red red", "red red red"], context_length=4)
    red, start, end = small.encode("red")[0], small.sot_token_id, small.eot_token_id
    assert ids.tolist() == [[start, red, red, end]] * 3
    assert cut == 2


def test_special_tokens_in_a_caption_are_plain_text(small: Tokenizer) -> None:
    ids = small(["red <end_of_text> blue <start_of_text>"], context_length=40)[0].tolist()
    assert ids.count(small.eot_token_id) == 1
    assert ids.count(small.sot_token_id) == 1
    assert small.encode("blue")[0] in ids


def test_unknown_text_survives_as_bytes(small: Tokenizer) -> None:
    for text in ("caf\u00e9 \u65e5\u672c", "xyzzy qqq"):
        assert small.decode(small(text, context_length=60)[0]) == text


def test_saved_and_read_back(tmp_path: Path, small: Tokenizer) -> None:
    again = get_tokenizer(tmp_path / "tokenizer.json")
    assert again.context_length == 16
    assert torch.equal(again(["red table", "table xyz"]), small(["red table", "table xyz"]))
    assert get_tokenizer(tmp_path).context_length == 16  # a folder with a tokenizer.json
    assert get_tokenizer(tmp_path, context_length=9)("a").shape == (1, 9)


def test_a_copy_in_another_process_is_the_same(small: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(small))
    text = "red <end_of_text> xyz"
    assert torch.equal(again(text), small(text))
    assert again.context_length == small.context_length


def test_training_is_deterministic(tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    captions = [a + b + c for a in letters for b in letters for c in "xyz"]  # thousands of equally frequent pairs
    for number in range(8):
        train_tokenizer(captions, tmp_path / f"{number}.json", 580)
    assert len({(tmp_path / f"{number}.json").read_bytes() for number in range(8)}) == 1
    assert get_tokenizer(tmp_path / "0.json").vocab_size <= 580


def test_wrong_names_files_and_arguments(tmp_path: Path, small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="did you mean 'ViT-B-16'"):
        get_tokenizer("ViT-B16")
    with pytest.raises(FileNotFoundError, match=r"nowhere.json does not exist"):
        get_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json does not exist"):
        get_tokenizer(tmp_path / "empty")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken.json is not a tokenizers JSON"):
        get_tokenizer(tmp_path / "broken.json")
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"broken.txt.gz is not CLIP's vocabulary"):
        get_tokenizer(tmp_path / "broken.txt.gz")
    with pytest.raises(ValueError, match="context_length: must be at least 3, was 2"):
        get_tokenizer(tmp_path, context_length=2)
    with pytest.raises(ValueError, match="vocab_size: must be at least 514"):
        train_tokenizer(["a"], tmp_path / "x.json", 100)


def test_end_token_must_be_the_largest_id(tmp_path: Path, small: Tokenizer) -> None:
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["added_tokens"].append(dict(saved["added_tokens"][-1], id=small.vocab_size, content="<later>"))
    (tmp_path / "late.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"must be the largest id, {small.vocab_size}"):
        get_tokenizer(tmp_path / "late.json")
    saved["added_tokens"] = []
    (tmp_path / "none.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="no start and end token"):
        get_tokenizer(tmp_path / "none.json")


@pytest.mark.peer
def test_ids_are_open_clips(tmp_path: Path) -> None:
    theirs = open_clip_module("open_clip.tokenizer").SimpleTokenizer()
    ours = get_tokenizer("ViT-B-32")
    assert (ours.vocab_size, ours.sot_token_id, ours.eot_token_id) == (49408, 49406, 49407)
    assert torch.equal(ours(PHRASES), theirs(PHRASES))
    assert torch.equal(ours(PHRASES, context_length=12), theirs(PHRASES, context_length=12))
    # the first example of OpenAI's CLIP README
    assert ours("a diagram")[0, :4].tolist() == [49406, 320, 22697, 49407]
    ours.save(tmp_path / "clip.json")
    assert torch.equal(get_tokenizer(tmp_path / "clip.json")(PHRASES), theirs(PHRASES))


@pytest.mark.peer
def test_ids_of_every_common_character_are_open_clips() -> None:
    theirs, ours = open_clip_module("open_clip.tokenizer").SimpleTokenizer(), clip_tokenizer()
    # private and unassigned characters are left out: the two libraries carry the tables of different Unicode versions
    known = [chr(c) for c in range(1, 0x3000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    texts = [f"{c}a {c}{c}1.{c}" for c in known if c != "\u0345"]  # a Greek mark that NFC moves after lower-casing
    differ = (ours(texts) != theirs(texts)).any(dim=1)
    assert not differ.any(), [text for text, wrong in zip(texts, differ, strict=True) if wrong]
