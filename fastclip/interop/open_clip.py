"""open_clip's way in: one call for a model and the transforms that belong to it."""

from __future__ import annotations

from pathlib import Path

import torch

from fastclip.data.transforms import Preprocess
from fastclip.models import CLIP, CLIPConfig, create_model

TRAIN_CROP_SCALE = (0.9, 1.0)


def create_model_and_transforms(
    name: str | CLIPConfig,
    *,
    checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    packed_text: bool = True,
) -> tuple[CLIP, Preprocess, Preprocess]:
    """(model, preprocess_train, preprocess_val), as open_clip returns them.

    A transform takes a PIL image and gives a normalised float32 (3, S, S): a random crop of 90 to 100 % of the area for
    training, the centre for evaluation. Arguments and errors are those of `create_model`.
    """
    model = create_model(name, checkpoint=checkpoint, dtype=dtype, device=device, packed_text=packed_text)
    config = model.config
    shared = (config.vision.image_size, config.image_mean, config.image_std)
    return model, Preprocess(*shared, crop_scale=TRAIN_CROP_SCALE), Preprocess(*shared)
