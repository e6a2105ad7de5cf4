"""Accuracy under corruptions and shifts, and how much of it a model's plain accuracy does not explain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastclip.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corrupted
from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.sets import HeldOut
from fastclip.evaluation.zero_shot import zero_shot

_NEAREST = 1e-4  # a share of 0 or 1 has no logit


def corruption_curves(encoder: Encoder, held_out: HeldOut, classifier: Tensor) -> dict[str, list[float]]:
    """Top-1 by corruption at severities 1 to 5. The set must have one label an image."""
    assert held_out.labels is not None
    return {
        name: [
            zero_shot(encoder.images(Corrupted(held_out.images, name, severity)), classifier, held_out.labels)["top1"]
            for severity in SEVERITIES
        ]
        for name in CORRUPTIONS
    }


def baseline_fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and offset of logit(shift) = slope logit(reference) + offset by least squares over other models' points.

    Args:
        points: (accuracy on the reference set, accuracy under the shift), shares, of two models at least.
    """
    xs, ys = [_logit(x) for x, _ in points], [_logit(y) for _, y in points]
    if len(points) < 2 or max(xs) == min(xs):
        raise ValueError(f"points: a baseline needs two models of different accuracy, had {len(points)}")
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    return slope, y_mean - slope * x_mean


def effective_robustness(reference: float, shift: float, fit: tuple[float, float]) -> dict[str, Any]:
    """What the model has beyond the baseline at its own accuracy (Taori et al. 2020): shift - expected, shares."""
    expected = 1 / (1 + math.exp(-(fit[0] * _logit(reference) + fit[1])))
    return {"reference": reference, "shift": shift, "expected": expected, "effective_robustness": shift - expected}


def _logit(share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"an accuracy must be a share in [0, 1], was {share}")
    share = min(max(share, _NEAREST), 1 - _NEAREST)
    return math.log(share / (1 - share))
