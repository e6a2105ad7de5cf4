"""What a person looks at: sentences with their best images, images with their best sentences, and which were right."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastclip.data.transforms import decode_image
from fastclip.evaluation.sets import HeldOut, ImageSource

QUERIES, SHOWN = 6, 5
THUMBNAIL = 160  # pixels along the longer side at most


class Gallery:
    """Collects examples set by set. Queries are taken at even distances, not by how well they did."""

    def __init__(self) -> None:
        self._text_to_image: list[dict[str, Any]] = []
        self._image_to_text: list[dict[str, Any]] = []

    def add_pairs(self, held_out: HeldOut, images: Tensor, texts: Tensor) -> None:
        """Captions with their best images and images with their best captions; features of unit length."""
        owners, source = held_out.caption_image, held_out.images
        for text in _spread(len(texts)):
            scores, best = _best(texts[text], images)
            shown = [
                {"key": source.keys[i], "score": s, "right": i == int(owners[text]), "image": _data_uri(source, i)}
                for s, i in zip(scores, best, strict=True)
            ]
            self._text_to_image.append({"text": held_out.captions[text], "images": shown})
        for image in _spread(len(images)):
            right = [int(owner) == image for owner in owners]
            self._add_image(source, image, images[image], texts, held_out.captions, right)

    def add_classes(self, held_out: HeldOut, images: Tensor, classifier: Tensor) -> None:
        """Images with their best classes."""
        assert held_out.labels is not None
        labels = F.one_hot(held_out.labels, len(classifier)) if held_out.labels.dim() == 1 else held_out.labels
        for image in _spread(len(images)):
            right = labels[image].bool().tolist()
            self._add_image(held_out.images, image, images[image], classifier, held_out.classnames, right)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: {"text_to_image": [...], "image_to_text": [...]}, images as data URIs."""
        return {"text_to_image": self._text_to_image, "image_to_text": self._image_to_text}

    def _add_image(
        self, source: ImageSource, image: int, features: Tensor, items: Tensor, texts: Sequence[str], right: list[bool]
    ) -> None:
        scores, best = _best(features, items)
        shown = [{"text": texts[i], "score": s, "right": right[i]} for s, i in zip(scores, best, strict=True)]
        entry = {"key": source.keys[image], "image": _data_uri(source, image), "texts": shown}
        self._image_to_text.append(entry)


def _spread(count: int) -> list[int]:
    return sorted({place * count // QUERIES for place in range(QUERIES)})


def _best(query: Tensor, items: Tensor) -> tuple[list[float], list[int]]:
    scores, best = torch.topk(items @ query, min(SHOWN, len(items)))
    return [round(score, 4) for score in scores.tolist()], best.tolist()


def _data_uri(source: ImageSource, number: int) -> str:
    return data_uri(source.image_file(number))


def data_uri(file: bytes) -> str:
    """A small PNG of an image file; one that cannot be decoded is the gray that the model saw."""
    from PIL import Image

    try:
        image = decode_image(file)
    except ValueError:
        image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), (128, 128, 128))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    png = io.BytesIO()
    image.save(png, "PNG")
    return f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"
