"""Zero-shot classification: a class is the mean of its prompts' features (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def prompts(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class in every template, class by class; `{}` in a template stands for the class name."""
    if not classnames or not templates:
        raise ValueError("classnames and templates must not be empty")
    without = [template for template in templates if "{}" not in template]
    if without:
        raise ValueError(f"template {without[0]!r} must hold {{}}, where the class name goes")
    return [template.replace("{}", name) for name in classnames for template in templates]


def zero_shot_classifier(
    encode_texts: Callable[[Sequence[str]], Tensor], classnames: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """(classes, D) of unit length: the features of a class's prompts, normalised, averaged and normalised again.

    encode_texts: texts -> features (texts, D), such as `Encoder.texts`.
    """
    features = F.normalize(encode_texts(prompts(classnames, templates)), dim=1)
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(1), dim=1)


def zero_shot(image_features: Tensor, classifier: Tensor, labels: Tensor) -> dict[str, Any]:
    """top1, top5, mean_per_class_recall (over the classes that occur), and the confusion matrix (true x predicted).

    Args:
        image_features: (N, D) of unit length.
        classifier: (classes, D) of unit length.
        labels: (N,) int64, the class of each image.
    """
    classes = len(classifier)
    if len(labels) != len(image_features) or not len(labels):
        raise ValueError(f"labels has {len(labels)} entries, must have {len(image_features)}, one an image, at least 1")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be in [0, {classes}), was {labels.min().item()} to {labels.max().item()}")
    best = (image_features @ classifier.T).topk(min(5, classes), dim=1).indices
    confusion = torch.bincount(labels * classes + best[:, 0], minlength=classes * classes).view(classes, classes)
    seen = confusion.sum(1) > 0
    recalls = confusion.diagonal()[seen] / confusion.sum(1)[seen]
    return {
        "top1": (best[:, 0] == labels).double().mean().item(),
        "top5": (best == labels[:, None]).any(1).double().mean().item(),
        "mean_per_class_recall": recalls.double().mean().item(),
        "confusion": confusion.tolist(),
    }
