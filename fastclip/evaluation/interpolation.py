"""WiSE-FT: the straight line between two checkpoints' weights, evaluated along the way (Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.suite import evaluate_folder
from fastclip.models import CLIP

ALPHAS = tuple(step / 10 for step in range(11))


def interpolated(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) first + alpha second, of every floating point entry; at 0 and 1 the very weights.

    Errors: `ValueError` for states with other names or shapes, or alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], was {alpha}")
    other = sorted(set(first) ^ set(second)) or [name for name in first if first[name].shape != second[name].shape]
    if other:
        raise ValueError(f"the two checkpoints must be of one architecture, but differ in {other[0]!r}")
    if alpha in (0, 1):
        return dict(second if alpha else first)
    return {
        name: torch.lerp(value.double(), second[name].double(), alpha).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def along_the_path(
    model: CLIP, second: Mapping[str, Tensor], encoder: Encoder, folder: str, alphas: Sequence[float] = ALPHAS
) -> list[dict[str, Any]]:
    """The figures at each alpha, 0 the model as it is and 1 the `second` state: [{"alpha", "data", "sets"}...].

    `encoder` is of `model`, whose weights are changed on the way and put back.
    """
    first = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    try:
        for alpha in alphas:
            model.load_state_dict(interpolated(first, second, alpha))
            found.append({"alpha": alpha} | evaluate_folder(encoder, folder))
    finally:
        model.load_state_dict(first)
    return found
