"""`python -m benchmarks.relations --checkpoint RUN [--data DATA]`: whether the demo's model knows what lies where.

Asks for every pair of held-out scenes of two objects in the words of `fastclip search`, "a red circle above a blue
square", and says in how many cases the scene that was meant scores above its twins: the one with the places of the two
objects exchanged, the one with their colours (chance 50 % each), both (33 %); and how often one of the best 1 and 5 of
all held-out scenes is as it was asked. Then which of size, colour, shape and place it sees, and knows whose they are:
how often a caption of two objects scores above the same with one of them exchanged between the two, or another in its
place. Last what comes first for the README's sentence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.cli.loading import find_source, load_encoder
from fastclip.data.demo.captions import bare_relation, relations
from fastclip.data.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, HeldOut, Object, Scene, held_out_scenes
from fastclip.errors import UserError
from fastclip.evaluation import Encoder, eval_sets

SENTENCE = "a red circle above a blue square"
WORDS = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES}
TWINS = {"base": ("places", "colours"), "places": ("base",), "colours": ("base",)}  # of a kind, by one exchange


class Question(NamedTuple):
    """One true relation in a held-out scene."""

    scene: int
    a: Object
    b: Object
    relation: str

    @property
    def sentence(self) -> str:
        return bare_relation(self.a, self.relation, self.b)

    def is_answered_by(self, scene: Scene) -> bool:
        looks = (self.a.colour, self.a.shape, self.b.colour, self.b.shape)
        return any(
            (x.colour, x.shape, y.colour, y.shape) == looks and self.relation in relations(x, y)
            for x, y in permutations(scene.objects, 2)
        )


def questions(held_out: Sequence[HeldOut]) -> list[Question]:
    """Of all scenes of two objects that have twins."""
    return [
        Question(number, a, b, relation)
        for number, held in enumerate(held_out)
        if held.kind in TWINS and len(held.scene.objects) == 2
        for a, b in permutations(held.scene.objects, 2)
        for relation in relations(a, b)
    ]


def report(scores: Tensor, asked: Sequence[Question], held_out: Sequence[HeldOut]) -> str:
    """What `scores` (questions, scenes) say, in a line."""
    place = {(held.group, held.kind): number for number, held in enumerate(held_out)}
    above: dict[str, list[bool]] = {"places": [], "colours": [], "both": []}
    found: dict[int, list[bool]] = {1: [], 5: []}
    for question, row in zip(asked, scores, strict=True):
        kind, group = held_out[question.scene].kind, held_out[question.scene].group
        for twin in TWINS[kind]:
            exchanged = kind if twin == "base" else twin
            above[exchanged].append(bool(row[question.scene] > row[place[group, twin]]))
        others = [row[place[group, other]] for other in TWINS if other != kind]
        above["both"].append(bool(row[question.scene] > max(others)))
        best = [question.is_answered_by(held_out[number].scene) for number in row.topk(5).indices.tolist()]
        for k, hits in found.items():
            hits.append(any(best[:k]))
    shares = {name: f"{sum(hits) / len(hits):.1%}" for name, hits in above.items()}
    retrieved = ", ".join(f"R@{k} {sum(hits) / len(hits):.1%}" for k, hits in found.items())
    return (
        f"{len(asked):,} bare relations: above the exchanged places {shares['places']}, above the exchanged colours "
        f"{shares['colours']}, above both {shares['both']}; of all {len(held_out):,} scenes {retrieved}"
    )


def caption(*objects: Object) -> str:
    """All that is true of them."""
    return ", ".join(f"{item.size} {item.colour} {item.shape} {item.place}" for item in objects)


def exchanged(a: Object, b: Object, kind: str) -> Iterator[str]:
    """The caption with what both have of `kind` exchanged; none where that is the same."""
    of_a, of_b = getattr(a, kind), getattr(b, kind)
    if of_a != of_b:
        yield caption(replace(a, **{kind: of_b}), replace(b, **{kind: of_a}))


def replaced(a: Object, b: Object, kind: str) -> Iterator[str]:
    """The captions with another word of `kind` for the first object, which the second does not have."""
    for word in WORDS[kind]:
        if word not in (getattr(a, kind), getattr(b, kind)):
            yield caption(replace(a, **{kind: word}), b)


def attributes(encoder: Encoder, images: Tensor, held_out: Sequence[HeldOut]) -> str:
    """In how many cases the true caption of a scene of two objects scores above the false, by kind, in two lines."""
    numbers = [number for number, held in enumerate(held_out) if len(held.scene.objects) == 2]
    images, pairs = images[numbers], [held_out[number].scene.objects for number in numbers]
    true = (encoder.texts([caption(*pair) for pair in pairs]) * images).sum(1)
    lines = []
    for false in (exchanged, replaced):
        shares = []
        for kind in WORDS:
            found = [(row, text) for row, (a, b) in enumerate(pairs) for text in false(a, b, kind)]
            rows = [row for row, _ in found]
            scores = (encoder.texts([text for _, text in found]) * images[rows]).sum(1)
            shares.append(f"{kind} {(true[rows] > scores).float().mean():.1%}")
        lines.append(f"the caption above the one with it {false.__name__}: {', '.join(shares)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="", help="a run of the demo (the newest)")
    parser.add_argument("--data", default="", help="its data (what the run names)")
    options = parser.parse_args(arguments)
    try:
        source = find_source(options.checkpoint, options.data)
        encoder = load_encoder(source, "", "fp32", 256)
        scenes = eval_sets(source.data, encoder.tokenizer, encoder.config.vision.image_size).get("scenes_test")
        held_out = held_out_scenes(seed=0)
        if scenes is None or len(scenes) != len(held_out):
            raise UserError(
                f"--data is {source.data}, must be a folder of `fastclip data demo`: its scenes are asked for"
            )
    except UserError as error:
        print(f"benchmarks.relations: {error}", file=sys.stderr)
        return 2
    images, asked = encoder.images(scenes), questions(held_out)
    print(report(encoder.texts([question.sentence for question in asked]) @ images.T, asked, held_out))
    print(attributes(encoder, images, held_out))
    print(f"{SENTENCE}:")
    scores = encoder.texts([SENTENCE])[0] @ images.T
    for number in scores.argsort(descending=True)[:5].tolist():
        print(f"  {scores[number]:.3f}  {caption(*held_out[number].scene.objects)}")
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
