"""Zero-shot classification: a class is the mean of its prompts' features (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Templates = Sequence[str] | Mapping[str, Sequence[str]]

_PROMPTS = 4096  # encoded at once
_SCORES = 1 << 24  # held at once
_PLACES = ("{}", "{c}")  # where the class name goes in a template; the second is CLIP_benchmark's


def prompts(classname: str, templates: Templates) -> list[str]:
    """A class in every template. Templates by class name (CuPL) may be whole sentences."""
    if isinstance(templates, Mapping):
        if not templates.get(classname):
            raise ValueError(f"templates has no prompt for the class {classname!r}")
        return [_filled(template, classname) for template in templates[classname]]
    return [_filled(template, classname) for template in templates]


def _filled(template: str, classname: str) -> str:
    for place in _PLACES:
        template = template.replace(place, classname)
    return template


def check_classes(classnames: Sequence[str], templates: Templates) -> None:
    """Raises `ValueError` for no class, an empty name, a name that occurs twice, or templates that hold no name."""
    if not classnames or not templates:
        raise ValueError("classnames and templates must not be empty")
    empty = [number for number, name in enumerate(classnames) if not name.strip()]
    if empty:
        raise ValueError(f"classnames: class {empty[0]} of {len(classnames)} has an empty name")
    seen: dict[str, int] = {}
    for number, name in enumerate(classnames):
        if seen.setdefault(name, number) != number:
            raise ValueError(
                f"classnames: {name!r} names the classes {seen[name]} and {number}, which no prompt could tell apart; "
                f"make the names different"
            )
    if not isinstance(templates, Mapping):
        without = [template for template in templates if not any(place in template for place in _PLACES)]
        if without:
            raise ValueError(f"template {without[0]!r} must hold {{}} or {{c}}, where the class name goes")


def zero_shot_classifier(
    encode_texts: Callable[[Sequence[str]], Tensor], classnames: Sequence[str], templates: Templates
) -> Tensor:
    """(classes, D) of unit length: the features of a class's prompts, normalised, averaged and normalised again.

    Prompts are written and encoded for some classes at a time.

    Args:
        encode_texts: texts -> features (texts, D), such as `Encoder.texts`.
        templates: for all classes, `{}` or `{c}` where the name goes; or for each class name its own prompts.
    """
    check_classes(classnames, templates)
    rows, waiting, sizes = [], list[str](), list[int]()
    for name in classnames:
        one = prompts(name, templates)
        if waiting and len(waiting) + len(one) > _PROMPTS:
            rows += _means(encode_texts(waiting), sizes)
            waiting, sizes = [], []
        waiting += one
        sizes.append(len(one))
    rows += _means(encode_texts(waiting), sizes)
    return torch.stack(rows)


def _means(features: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [F.normalize(one.mean(0), dim=0) for one in F.normalize(features, dim=1).split(list(sizes))]


def zero_shot(image_features: Tensor, classifier: Tensor, labels: Tensor) -> dict[str, Any]:
    """top1, top5, mean_per_class_recall (over the classes that occur), and the confusion matrix (true x predicted).

    Of equal scores the smaller class comes first.

    Args:
        image_features: (N, D) of unit length.
        classifier: (classes, D) of unit length.
        labels: (N,) int64, the class of each image.
    """
    classes = len(classifier)
    check_labels(labels, len(image_features), classes)
    ranks, predicted = [], []
    rows = max(1, _SCORES // classes)
    for images, true in zip(image_features.split(rows), labels.split(rows), strict=True):
        scores = images @ classifier.T
        own = scores.gather(1, true[:, None])
        number = torch.arange(classes, device=scores.device)
        ahead = (scores > own) | ((scores == own) & (number < true[:, None]))
        ranks.append(ahead.sum(1))
        predicted.append(torch.where(scores == scores.amax(1, keepdim=True), number, classes).amin(1))
    rank = torch.cat(ranks)
    confusion = torch.bincount(labels * classes + torch.cat(predicted), minlength=classes * classes)
    confusion = confusion.view(classes, classes)
    seen = confusion.sum(1) > 0
    recalls = confusion.diagonal()[seen].double() / confusion.sum(1)[seen]
    return {
        "top1": (rank == 0).double().mean().item(),
        "top5": (rank < 5).double().mean().item(),
        "mean_per_class_recall": recalls.mean().item(),
        "confusion": confusion.tolist(),
    }


def check_labels(labels: Tensor, images: int, classes: int) -> None:
    """Raises `ValueError` unless there is one label in [0, classes) for each image, and at least one."""
    if len(labels) != images or not len(labels):
        raise ValueError(f"labels has {len(labels)} entries, must have {images}, one an image, at least 1")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be in [0, {classes}), was {labels.min().item()} to {labels.max().item()}")


def multi_label(image_features: Tensor, classifier: Tensor, labels: Tensor) -> dict[str, Any]:
    """mean_average_precision over all classes, and the average precision of each class that has an image.

    A class's average precision: images sorted by falling score (equal scores by index), the mean over its images of the
    share of its images up to there. A class without an image counts 0, as in CLIP_benchmark.

    Args:
        labels: (N, classes) bool, the classes of each image.
    """
    if labels.shape != (len(image_features), len(classifier)) or not len(labels):
        raise ValueError(
            f"labels must be (images, classes) = ({len(image_features)}, {len(classifier)}), was {tuple(labels.shape)}"
        )
    places = torch.arange(1, len(labels) + 1, dtype=torch.float64)
    found = []
    for number in range(len(classifier)):
        order = (image_features @ classifier[number]).sort(descending=True, stable=True).indices
        right = labels[order, number].bool()
        hits = right.double().cumsum(0)
        found.append((hits / places)[right].sum().item() / max(int(right.sum()), 1))
    return {"mean_average_precision": sum(found) / len(found), "average_precision": found}
