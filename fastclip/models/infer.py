"""The config that the shapes of an OpenAI checkpoint imply: its files carry none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastclip.models.config import CLIPConfig, TextConfig, VisionConfig
from fastclip.models.layouts import plain

HEAD_WIDTH = 64  # of every model that OpenAI published


def openai_config(raw: Mapping[str, Any]) -> CLIPConfig:
    """The config of a state dict of OpenAI's CLIP: heads 64 wide, QuickGELU.

    Raises ValueError naming the first entry that is missing.
    """
    state = plain(raw)
    try:
        width, embed_dim = state["text_projection"].shape
        text = TextConfig(
            context_length=len(state["positional_embedding"]),
            vocab_size=len(state["token_embedding.weight"]),
            width=width,
            heads=width // HEAD_WIDTH,
            layers=_count(state, r"transformer\.resblocks\.(\d+)\..*"),
        )
        vision = _transformer(state) if "visual.proj" in state else _resnet(state)
    except KeyError as error:
        raise ValueError(f"the checkpoint has the marks of OpenAI's CLIP, but no {error.args[0]!r}") from None
    return CLIPConfig(embed_dim, vision, text, quick_gelu=True)


def _transformer(state: Mapping[str, Any]) -> VisionConfig:
    patch = state["visual.conv1.weight"]
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    return VisionConfig(
        image_size=grid * patch.shape[-1],
        patch_size=patch.shape[-1],
        width=patch.shape[0],
        head_width=HEAD_WIDTH,
        layers=_count(state, r"visual\.transformer\.resblocks\.(\d+)\..*"),
    )


def _resnet(state: Mapping[str, Any]) -> VisionConfig:
    grid = round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
    return VisionConfig(
        image_size=32 * grid,
        layers=tuple(_count(state, rf"visual\.layer{stage}\.(\d+)\..*") for stage in (1, 2, 3, 4)),
        width=state["visual.layer1.0.conv1.weight"].shape[0],
    )


def _count(state: Mapping[str, Any], pattern: str) -> int:
    """Different numbers that the names of a pattern hold."""
    return len({match[1] for name in state if (match := re.fullmatch(pattern, name))})
