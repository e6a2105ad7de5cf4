"""The named models. Figures are those of open_clip's model configs of the same name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastclip.models.config import CLIPConfig, TextConfig, VisionConfig, nearest

_QUICK_GELU = "-quickgelu"


def debug() -> CLIPConfig:
    """A Vision Transformer that trains in seconds: for tests, on the 64-pixel images of the demo data."""
    vision = VisionConfig(image_size=64, patch_size=16, layers=2, width=64, head_width=32)
    text = TextConfig(context_length=32, vocab_size=1024, width=64, heads=2, layers=2)
    return CLIPConfig(embed_dim=64, vision=vision, text=text)


def demo() -> CLIPConfig:
    """The model of `make demo`: small enough to learn the embedded data set in minutes on two cores."""
    vision = VisionConfig(image_size=64, patch_size=16, layers=4, width=256, head_width=64, conv_stem=(32, 64, 128))
    text = TextConfig(context_length=32, vocab_size=1024, width=256, heads=4, layers=4)
    return CLIPConfig(embed_dim=256, vision=vision, text=text)


def rn50() -> CLIPConfig:
    """ModifiedResNet-50, 102.0 M parameters (Radford et al. 2021)."""
    return CLIPConfig(embed_dim=1024, vision=VisionConfig(layers=(3, 4, 6, 3), width=64))


def vit_b_32() -> CLIPConfig:
    """151.3 M parameters, 50 image tokens (Radford et al. 2021)."""
    return CLIPConfig(vision=VisionConfig(patch_size=32))


def vit_b_16() -> CLIPConfig:
    """149.6 M parameters, 197 image tokens (Radford et al. 2021)."""
    return CLIPConfig(vision=VisionConfig(patch_size=16))


def vit_l_14() -> CLIPConfig:
    """427.6 M parameters, 257 image tokens (Radford et al. 2021)."""
    return CLIPConfig(
        embed_dim=768,
        vision=VisionConfig(patch_size=14, layers=24, width=1024),
        text=TextConfig(width=768, heads=12),
    )


PRESETS: dict[str, Callable[[], CLIPConfig]] = {
    "debug": debug,
    "demo": demo,
    "RN50": rn50,
    "ViT-B-32": vit_b_32,
    "ViT-B-16": vit_b_16,
    "ViT-L-14": vit_l_14,
}


def get_config(name: str) -> CLIPConfig:
    """The config called `name`; "-quickgelu" behind a name, as in open_clip, is OpenAI's activation.

    Raises ValueError naming the nearest model when there is none of that name.
    """
    base = name.removesuffix(_QUICK_GELU)
    if base not in PRESETS:
        raise ValueError(f"unknown model {name!r}{nearest(base, PRESETS)}")
    return replace(PRESETS[base](), quick_gelu=base != name)
