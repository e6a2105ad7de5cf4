"""What a person looks at: sentences with their best images, images with their best sentences, and which were right."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.data import EvalSet
from fastclip.data.transforms import decode_image

QUERIES, SHOWN = 6, 5
THUMBNAIL = 160  # pixels along the longer side at most


class Gallery:
    """Collects examples set by set. Queries are taken at even distances, not by how well they did."""

    def __init__(self) -> None:
        self._text_to_image: list[dict[str, Any]] = []
        self._image_to_text: list[dict[str, Any]] = []

    def add_pairs(self, eval_set: EvalSet, images: Tensor, texts: Tensor) -> None:
        """Captions with their best images and images with their best captions; features of unit length."""
        owners = eval_set.caption_image
        for text in _spread(len(texts)):
            scores, best = _best(texts[text], images)
            shown = [
                {"key": eval_set.keys[i], "score": s, "right": i == int(owners[text]), "image": _data_uri(eval_set, i)}
                for s, i in zip(scores, best, strict=True)
            ]
            self._text_to_image.append({"text": eval_set.captions[text], "images": shown})
        for image in _spread(len(images)):
            captions, right = eval_set.captions, [int(owner) == image for owner in owners]
            self._add_image(eval_set, image, images[image], texts, captions, right)

    def add_classes(self, eval_set: EvalSet, images: Tensor, classifier: Tensor, classnames: Sequence[str]) -> None:
        """Images with their best classes."""
        assert eval_set.labels is not None
        for image in _spread(len(images)):
            right = [number == int(eval_set.labels[image]) for number in range(len(classnames))]
            self._add_image(eval_set, image, images[image], classifier, classnames, right)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: {"text_to_image": [...], "image_to_text": [...]}, images as data URIs."""
        return {"text_to_image": self._text_to_image, "image_to_text": self._image_to_text}

    def _add_image(
        self, eval_set: EvalSet, image: int, features: Tensor, items: Tensor, texts: Sequence[str], right: list[bool]
    ) -> None:
        scores, best = _best(features, items)
        shown = [{"text": texts[i], "score": s, "right": right[i]} for s, i in zip(scores, best, strict=True)]
        entry = {"key": eval_set.keys[image], "image": _data_uri(eval_set, image), "texts": shown}
        self._image_to_text.append(entry)


def _spread(count: int) -> list[int]:
    return sorted({place * count // QUERIES for place in range(QUERIES)})


def _best(query: Tensor, items: Tensor) -> tuple[list[float], list[int]]:
    scores, best = torch.topk(items @ query, min(SHOWN, len(items)))
    return [round(score, 4) for score in scores.tolist()], best.tolist()


def _data_uri(eval_set: EvalSet, number: int) -> str:
    """A small PNG of an image of the set; an image that cannot be decoded is the gray that the model saw."""
    from PIL import Image

    try:
        image = decode_image(eval_set.image_file(number))
    except ValueError:
        image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), (128, 128, 128))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    png = io.BytesIO()
    image.save(png, "PNG")
    return f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"
