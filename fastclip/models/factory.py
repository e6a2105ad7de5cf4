"""Making a model from a name, a folder, the hub or a config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fastclip.models.checkpoint import empty_model, load_weights, read_checkpoint
from fastclip.models.clip import CLIP
from fastclip.models.config import CLIPConfig
from fastclip.models.files import find_config, find_weights, locate
from fastclip.models.presets import get_config


def create_model(
    name: str | CLIPConfig,
    *,
    checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    packed_text: bool = True,
    force_image_size: int | None = None,
    force_context_length: int | None = None,
) -> CLIP:
    """The model called `name` (open_clip's names, "debug" and "demo") or described by a config.

    name: also `hf-hub:ORG/NAME` (from the local cache where the hub cannot be reached) and `local-dir:PATH`, which mean
        the config and the weights there, in open_clip's form or as a CLIPModel or SiglipModel of transformers.
    checkpoint: a run folder, a step folder, a weight file or one of those two forms; without it the weights of a named
        model are OpenAI's initialisation, drawn from PyTorch's global generator.
    dtype: of every parameter and buffer that is a float; default float32.
    packed_text: encode captions at their true length where that is exact; same features and gradients, less work.
    force_image_size, force_context_length: instead of the config's; position embeddings are interpolated.
    Raises ValueError naming the nearest model for an unknown name, or all that differs in an unfit checkpoint;
    FileNotFoundError for files that are not there.
    """
    config, weights = find_model(name)
    config = resized(config, force_image_size, force_context_length)
    source = weights if checkpoint is None else checkpoint
    if source is None:
        return CLIP(config, packed_text).to(device=device, dtype=dtype)
    model = empty_model(config, packed_text)
    is_resized = force_image_size is not None or force_context_length is not None
    return load_weights(model, source, device=device, dtype=dtype, resize=is_resized)


def find_model(name: str | CLIPConfig) -> tuple[CLIPConfig, Path | None]:
    """The config that `name` means (see `create_model`), and its file of weights where it means one."""
    if isinstance(name, CLIPConfig):
        return name, None
    folder = locate(name)
    if folder is None:
        return get_config(name), None
    weights = find_weights(folder)
    return find_config(weights) or read_checkpoint(weights)[0], weights


def resized(config: CLIPConfig, image_size: int | None, context_length: int | None) -> CLIPConfig:
    """`config` for images and captions of other sizes; None leaves one as it is."""
    if context_length is not None and config.text.embed_cls and context_length != config.text.context_length:
        raise ValueError(
            f"force_context_length must be {config.text.context_length}, the model's, was {context_length}: the class "
            "token behind its captions (embed_cls) has the last position"
        )
    vision = config.vision if image_size is None else replace(config.vision, image_size=image_size)
    text = config.text if context_length is None else replace(config.text, context_length=context_length)
    return replace(config, vision=vision, text=text)
