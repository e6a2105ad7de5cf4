"""What `benchmarks.relations` asks and counts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import relations
from fastclip.data.demo.scenes import Object, held_out_scenes

HELD_OUT = held_out_scenes(seed=0)
ASKED = relations.questions(HELD_OUT)


def test_the_readmes_sentence_is_asked_of_its_scene() -> None:
    wanted = {("medium", "top"), ("medium", "bottom")}
    same_words = [question for question in ASKED if question.sentence == relations.SENTENCE]
    (found,) = [q for q in same_words if {(x.size, x.place) for x in (q.a, q.b)} == wanted]
    assert HELD_OUT[found.scene].kind == "base"
    assert found.is_answered_by(HELD_OUT[found.scene].scene)
    twins = [held for held in HELD_OUT if held.group == HELD_OUT[found.scene].group and held.kind != "base"]
    assert len(twins) == 2
    assert not any(found.is_answered_by(held.scene) for held in twins)


def test_who_knows_all_is_always_right_and_who_knows_the_words_alone_never() -> None:
    true = torch.tensor([[question.is_answered_by(held.scene) for held in HELD_OUT] for question in ASKED]).double()
    said = relations.report(true, ASKED, HELD_OUT)
    assert "places 100.0%, above the exchanged colours 100.0%, above both 100.0%" in said
    assert "R@1 100.0%, R@5 100.0%" in said
    assert "places 0.0%, above the exchanged colours 0.0%, above both 0.0%" in relations.report(
        torch.zeros_like(true), ASKED, HELD_OUT
    )


def test_what_is_missing_is_said(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert relations.main(["--checkpoint", f"{tmp_path}/none"]) == 2
    assert "benchmarks.relations: " in capsys.readouterr().err


def test_captions_with_one_thing_exchanged_or_replaced() -> None:
    a, b = Object("small", "red", "circle", "top"), Object("large", "blue", "circle", "left")
    assert list(relations.exchanged(a, b, "place")) == ["small red circle left, large blue circle top"]
    assert list(relations.exchanged(a, b, "shape")) == []
    assert list(relations.replaced(a, b, "size")) == ["medium red circle top, large blue circle left"]
    assert [len(list(relations.replaced(a, b, kind))) for kind in relations.WORDS] == [1, 6, 7, 7]


def test_who_knows_the_words_alone_is_told_by_what_is_exchanged() -> None:
    words = {part for kind in relations.WORDS.values() for word in kind for part in word.split()}

    class BagOfWords:
        def texts(self, texts: list[str]) -> Tensor:
            parts = [text.replace(",", "").split() for text in texts]
            return torch.tensor([[float(found.count(word)) for word in words] for found in parts])

    encoder: Any = BagOfWords()
    images = encoder.texts([relations.caption(*held.scene.objects) for held in HELD_OUT])
    exchanged, replaced = relations.attributes(encoder, images, HELD_OUT).splitlines()
    assert exchanged.endswith("size 0.0%, colour 0.0%, shape 0.0%, place 0.0%")
    assert "size 100.0%, colour 100.0%, shape 100.0%" in replaced
