"""Edited captions: words or pairs of them exchanged or one replaced, where they could stand, drawn by name."""

from __future__ import annotations

from pathlib import Path

import torch
from data_helpers import small_tokenizer, write_samples

from fastclip.data import Loader
from fastclip.data.edits import CaptionEdits
from fastclip.data.streams import Stream

CAPTIONS = ["a red circle and a blue square", "a blue circle and a red square", "a red square"]


def every_edit(edits: CaptionEdits, caption: str) -> set[str]:
    return {edits.edited(caption, Stream("x", number)) for number in range(200)}


def test_words_change_places_where_captions_have_them() -> None:
    assert every_edit(CaptionEdits(CAPTIONS), CAPTIONS[0]) == {"a blue circle and a red square"}  # no circle comes last
    assert every_edit(CaptionEdits([*CAPTIONS, "a square and a circle"]), CAPTIONS[0]) == {
        "a blue circle and a red square",
        "a red square and a blue circle",
        "a blue square and a red circle",
    }


def test_pairs_that_share_a_word_in_the_same_place_do_not_change_places() -> None:
    """The exchange of their other words does the same."""
    caption, exchanged = "a red ring on a red star", "a red star on a red ring"
    edits = CaptionEdits([caption, exchanged])
    assert every_edit(edits, caption) == {exchanged}
    assert len(list(edits._exchanges(["", *caption.split(), ""]))) == 1


def test_without_an_exchange_one_word_is_replaced() -> None:
    edits = CaptionEdits([*CAPTIONS, "a red ring"])
    assert every_edit(edits, "a red square") == {"a red ring", "a blue square"}


def test_without_either_there_is_no_negative() -> None:
    edits = CaptionEdits(CAPTIONS)
    assert every_edit(edits, "") == {""}
    assert every_edit(edits, "never seen words") == {""}
    assert every_edit(CaptionEdits(["one two"]), "one two") == {""}


def test_neighbours_may_swap() -> None:
    assert every_edit(CaptionEdits(["a b c", "b a c"]), "a b c") == {"b a c"}
    # b may begin, but a was never behind it: no exchange
    assert every_edit(CaptionEdits(["a b c", "b d"]), "a b c") == {"a b d"}


def test_the_loader_adds_them_by_sample(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path)
    folder = write_samples(tmp_path / "shards", 12)

    def loader(rank: int = 0, world_size: int = 1) -> Loader:
        return Loader(folder, tokenizer, 8, 8, rank, world_size, seed=3, workers=0, hard_negatives=True)

    whole = loader()[5]
    assert "negative_text" not in Loader(folder, tokenizer, 8, 8, seed=3, workers=0)[5]
    assert whole["negative_text"].shape == whole["text"].shape
    assert (whole["negative_text"] != whole["text"]).any(1).all()
    parts = [loader(rank, 2)[5]["negative_text"] for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole["negative_text"])
