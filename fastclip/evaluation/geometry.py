"""How the two clouds of features lie: modality gap, alignment, uniformity; and what prompts lie near which group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ROWS = 1024
SHOWN = 300  # points of each cloud in a picture


def clouds(image_features: Tensor, text_features: Tensor, caption_image: Tensor) -> dict[str, Any]:
    """Figures of the two clouds, and their picture.

    gap = |mean image - mean text| (Liang et al. 2022); alignment = mean over pairs of |x - y|^2, uniformity of a
    cloud = log of the mean over its pairs of exp(-2 |x - x'|^2) (Wang & Isola 2020). "picture": up to 300 points
    [x, y] of each cloud in the two directions of largest variance of both together, "explained": their share of it.

    Args:
        image_features, text_features: (N, D) and (M, D) of unit length, two rows each at least.
        caption_image: (M,) int64, the image of each text.
    """
    images, texts = image_features.double(), text_features.double()
    if len(images) < 2 or len(texts) < 2:
        raise ValueError(f"two images and two texts at least are needed, had {len(images)} and {len(texts)}")
    shown = [cloud[:: max(1, len(cloud) // SHOWN)][:SHOWN] for cloud in (images, texts)]
    both = torch.cat(shown)
    centred = both - both.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2] * directions[:2].sum(1, keepdim=True).sign()  # else a library chooses the sign
    places = centred @ directions.T
    return {
        "gap": (images.mean(0) - texts.mean(0)).norm().item(),
        "alignment": (images[caption_image] - texts).square().sum(1).mean().item(),
        "uniformity": {"images": _uniformity(images), "texts": _uniformity(texts)},
        "picture": {"images": places[: len(shown[0])].tolist(), "texts": places[len(shown[0]) :].tolist()},
        "explained": (values[:2].square().sum() / values.square().sum()).item(),
    }


def _uniformity(features: Tensor) -> float:
    total = 0.0
    for start in range(0, len(features), _ROWS):
        block = features[start : start + _ROWS]
        distance = torch.cdist(block, features, compute_mode="donot_use_mm_for_euclid_dist")
        kernel = (-2 * distance.square()).exp()
        total += kernel.sum().item() - len(block)  # less each point with itself
    return math.log(total / (len(features) * (len(features) - 1)))


def associations(groups: Mapping[str, Tensor], prompts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which prompts lie near which group, and by how much two groups differ.

    "mean_cosine" and "nearest" (share of the group's members whose nearest prompt it is), by group and prompt;
    "effect_size" by prompt for each two groups: (mean_a - mean_b) / deviation of all their members' cosines, as in WEAT
    (Caliskan et al. 2017): 0 is none, 0.8 is called large.

    Args:
        groups: name -> features (members, D) of unit length, of images or texts.
        prompts: prompt -> features (D,) of unit length.
    """
    if not groups or not prompts or any(len(members) == 0 for members in groups.values()):
        raise ValueError("groups and prompts must not be empty, nor any group")
    directions = torch.stack(list(prompts.values())).double()
    cosines = {name: members.double() @ directions.T for name, members in groups.items()}
    names, effect = list(groups), {}
    for place, a in enumerate(names):
        for b in names[place + 1 :]:
            both = torch.cat([cosines[a], cosines[b]])
            spread = both.std(0).clamp(min=1e-12)
            effect[f"{a} - {b}"] = dict(
                zip(prompts, ((cosines[a].mean(0) - cosines[b].mean(0)) / spread).tolist(), strict=True)
            )
    count = len(prompts)
    return {
        "mean_cosine": {name: dict(zip(prompts, c.mean(0).tolist(), strict=True)) for name, c in cosines.items()},
        "nearest": {
            name: dict(zip(prompts, (c.argmax(1).bincount(minlength=count) / len(c)).tolist(), strict=True))
            for name, c in cosines.items()
        },
        "members": {name: len(members) for name, members in groups.items()},
        "effect_size": effect,
    }
