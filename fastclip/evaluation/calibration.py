"""What the temperature does: confidence beside accuracy, and how both move with the logit scale (Guo et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip.evaluation.zero_shot import check_labels

BINS = 15
SCALES = tuple(round(10 ** (step / 8), 4) for step in range(25))  # 1 to 1,000


def calibration(image_features: Tensor, classifier: Tensor, labels: Tensor, logit_scale: float) -> dict[str, Any]:
    """Reliability at the model's own scale and ECE, entropy and negative log-likelihood over scales.

    p = softmax(logit_scale x . w); confidence is max p, entropy in nats. ECE = sum_b n_b / N |accuracy_b -
    confidence_b| over 15 bins of equal width in (0, 1], a bin holding its upper edge. Returns {"logit_scale", "ece",
    "nll", "entropy", "confidence", "bins": [[images, confidence, accuracy]...], "scales": [[scale, ece, nll,
    entropy]...], "best_scale"}, the last by lowest negative log-likelihood.

    Args:
        logit_scale: the factor itself, not its logarithm.
    """
    check_labels(labels, len(image_features), len(classifier))
    cosines = (image_features @ classifier.T).double()
    own = _at(cosines, labels, logit_scale)
    scales = [[scale, *(_at(cosines, labels, scale)[key] for key in ("ece", "nll", "entropy"))] for scale in SCALES]
    return own | {"scales": scales, "best_scale": min(scales, key=lambda row: row[2])[0]}


def _at(cosines: Tensor, labels: Tensor, scale: float) -> dict[str, Any]:
    log_p = (scale * cosines).log_softmax(1)
    p = log_p.exp()
    confidence, predicted = p.max(1)
    right = (predicted == labels).double()
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    place = (torch.bucketize(confidence, edges) - 1).clamp(0, BINS - 1)
    count = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, torch.ones_like(right))
    sums = [torch.zeros(BINS, dtype=torch.float64).index_add(0, place, each) for each in (confidence, right)]
    full = count > 0
    means = [torch.where(full, each / count.clamp(min=1), 0) for each in sums]
    return {
        "logit_scale": scale,
        "ece": ((means[0] - means[1]).abs() * count).sum().item() / len(labels),
        "nll": -log_p.gather(1, labels[:, None]).mean().item(),
        "entropy": -(p * log_p.clamp(min=-1e30)).sum(1).mean().item(),
        "confidence": confidence.mean().item(),
        "bins": [[int(n), c, a] for n, c, a in zip(count.tolist(), means[0].tolist(), means[1].tolist(), strict=True)],
    }
