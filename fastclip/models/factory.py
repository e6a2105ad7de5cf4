"""Making a model from a name or a config."""

from __future__ import annotations

from pathlib import Path

import torch

from fastclip.models.checkpoint import load_weights
from fastclip.models.clip import CLIP
from fastclip.models.config import CLIPConfig
from fastclip.models.presets import get_config


def create_model(
    name: str | CLIPConfig,
    *,
    checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    packed_text: bool = True,
) -> CLIP:
    """The model called `name` (open_clip's names, "debug" and "demo") or described by a config.

    checkpoint: a run folder, a step folder or a weight file; without it the weights are OpenAI's initialisation, drawn
        from PyTorch's global generator.
    dtype: of every parameter and buffer that is a float; default float32.
    packed_text: encode captions at their true length; same features and gradients, less work.
    Raises ValueError naming the nearest model for an unknown name, or all that differs in an unfit checkpoint.
    """
    config = get_config(name) if isinstance(name, str) else name
    if checkpoint is None:
        return CLIP(config, packed_text).to(device=device, dtype=dtype)
    with torch.device("meta"):
        model = CLIP(config, packed_text)
    return load_weights(model, checkpoint, device=device, dtype=dtype)
