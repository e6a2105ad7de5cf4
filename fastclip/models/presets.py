"""The named models. Figures are those of open_clip's model configs of the same name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fastclip.models.config import CLIPConfig, DecoderConfig, TextConfig, VisionConfig, nearest
from fastclip.models.config_json import siglip_vision

_QUICK_GELU = "-quickgelu"
_SIGLIP_HALF = (0.5, 0.5, 0.5)


def debug() -> CLIPConfig:
    """A Vision Transformer that trains in seconds: for tests, on the 64-pixel images of the demo data."""
    vision = VisionConfig(image_size=64, patch_size=16, layers=2, width=64, head_width=32)
    text = TextConfig(context_length=32, vocab_size=1024, width=64, heads=2, layers=2)
    return CLIPConfig(embed_dim=64, vision=vision, text=text)


def demo() -> CLIPConfig:
    """The model of `make demo`: small enough to learn the embedded data set in minutes on two cores."""
    vision = VisionConfig(
        image_size=64, patch_size=16, layers=4, width=256, head_width=64, conv_stem=(32, 64, 128), pool_type="flatten"
    )
    text = TextConfig(context_length=32, vocab_size=1024, width=256, heads=4, layers=2)
    return CLIPConfig(embed_dim=256, vision=vision, text=text)


def _text(width: int, layers: int = 12) -> TextConfig:
    return TextConfig(width=width, heads=width // 64, layers=layers)


def _resnet(embed_dim: int, image: int, layers: tuple[int, ...], width: int, text: int) -> CLIPConfig:
    """A ModifiedResNet (Radford et al. 2021)."""
    return CLIPConfig(embed_dim, VisionConfig(image_size=image, layers=layers, width=width), _text(text))


def _vit(
    embed_dim: int,
    width: int,
    layers: int,
    patch: int,
    image: int = 224,
    *,
    head: int = 64,
    mlp: float = 4.0,
    text: tuple[int, int] = (512, 12),
    scale: float | None = None,
) -> CLIPConfig:
    """A Vision Transformer and a causal text Transformer of width and depth `text`."""
    vision = VisionConfig(
        image_size=image, layers=layers, width=width, head_width=head, mlp_ratio=mlp, patch_size=patch,
        ls_init_value=scale,
    )  # fmt: skip
    return CLIPConfig(embed_dim, vision, _text(*text))


def coca_debug() -> CLIPConfig:
    """`debug` with CoCa's pooling and decoder."""
    config = debug()
    vision = replace(config.vision, attentional_pool=True, attn_pooler_queries=9, attn_pooler_heads=2)
    return _coca(replace(config, vision=vision), DecoderConfig(64, 2, 2), 32)


def _coca(base: CLIPConfig, decoder: DecoderConfig, context: int = 76) -> CLIPConfig:
    """`base` with a decoder of captions behind it (Yu et al. 2022, arXiv 2205.01917)."""
    text = replace(base.text, context_length=context, embed_cls=True)
    return replace(base, text=text, decoder=decoder, custom_text=True)


def _coca_vit(name: str, *decoder: int) -> CLIPConfig:
    base = PRESETS[name]()
    return _coca(replace(base, vision=replace(base.vision, attentional_pool=True)), DecoderConfig(*decoder))


def _coca_base() -> CLIPConfig:
    base = _vit(512, 768, 12, 18, 288, text=(768, 12))
    return _coca(replace(base, text=replace(base.text, vocab_size=64000)), DecoderConfig(768, 12, 12))


def _clipa(base: str, image: int = 224) -> CLIPConfig:
    """The same without ln_pre and causal mask, with average pooling and 32 BERT tokens (Li et al. 2023)."""
    config = PRESETS[base]()
    vision = replace(config.vision, image_size=image, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True)
    text = replace(
        config.text, context_length=32, vocab_size=32000, pool_type="last", no_causal_mask=True,
        hf_tokenizer_name="bert-base-uncased", tokenizer_kwargs={"strip_sep_token": True},
    )  # fmt: skip
    return replace(config, vision=vision, text=text)


def _siglip(
    timm: str, tokenizer: str, *, vocab: int = 32000, context: int = 64, text: int = 0, tanh: bool = False
) -> CLIPConfig:
    """SigLIP (Zhai et al. 2023): one learned query pools the image, a bidirectional text tower its last token.

    text: the text tower's width where it is not the image tower's.
    """
    vision = siglip_vision(timm)
    width, heads, layers, mlp = (
        (1152, 16, 27, 3.7362)
        if 1152 in (vision.width, text)
        else (vision.width, vision.width // 64, vision.layers, 4.0)
    )
    assert isinstance(layers, int)
    config = TextConfig(
        context_length=context, vocab_size=vocab, width=width, heads=heads, layers=layers, mlp_ratio=mlp,
        pool_type="last", no_causal_mask=True, proj_bias=True, norm_eps=1e-6, gelu_tanh=tanh,
        hf_tokenizer_name=f"timm/{tokenizer}", tokenizer_kwargs={"clean": "canonicalize"},
    )  # fmt: skip
    return CLIPConfig(
        vision.width, vision, config, custom_text=True, init_logit_scale=math.log(10), init_logit_bias=-10.0,
        image_mean=_SIGLIP_HALF, image_std=_SIGLIP_HALF, resize_mode="squash",
    )  # fmt: skip


_vit_h = partial(_vit, 1024, 1280, 32, head=80, text=(1024, 24))

PRESETS: dict[str, Callable[[], CLIPConfig]] = {
    "debug": debug,
    "demo": demo,
    "RN50": partial(_resnet, 1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": partial(_resnet, 512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": partial(_resnet, 640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": partial(_resnet, 768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": partial(_resnet, 1024, 448, (3, 15, 36, 10), 128, 1024),
    "ViT-S-32": partial(_vit, 384, 384, 12, 32, text=(384, 12)),
    "ViT-S-32-alt": partial(_vit, 256, 384, 12, 32, text=(256, 10)),
    "ViT-S-16": partial(_vit, 384, 384, 12, 16, text=(384, 12)),
    "ViT-S-16-alt": partial(_vit, 256, 384, 12, 16, text=(256, 10)),
    "ViT-M-32": partial(_vit, 512, 512, 12, 32),
    "ViT-M-32-alt": partial(_vit, 384, 512, 12, 32, text=(384, 12)),
    "ViT-M-16": partial(_vit, 512, 512, 12, 16),
    "ViT-M-16-alt": partial(_vit, 384, 512, 12, 16, text=(384, 12), scale=1e-4),
    "ViT-B-32": partial(_vit, 512, 768, 12, 32),
    "ViT-B-32-256": partial(_vit, 512, 768, 12, 32, 256),
    "ViT-B-32-plus-256": partial(_vit, 640, 896, 12, 32, 256, text=(640, 12)),
    "ViT-B-16": partial(_vit, 512, 768, 12, 16),
    "ViT-B-16-plus": partial(_vit, 640, 896, 12, 16, text=(640, 12)),
    "ViT-B-16-plus-240": partial(_vit, 640, 896, 12, 16, 240, text=(640, 12)),
    "ViT-L-16": partial(_vit, 768, 1024, 24, 16, text=(768, 12)),
    "ViT-L-16-320": partial(_vit, 768, 1024, 24, 16, 320, text=(768, 12)),
    "ViT-L-14": partial(_vit, 768, 1024, 24, 14, text=(768, 12)),
    "ViT-L-14-280": partial(_vit, 768, 1024, 24, 14, 280, text=(768, 12)),
    "ViT-L-14-336": partial(_vit, 768, 1024, 24, 14, 336, text=(768, 12)),
    "ViT-H-16": partial(_vit_h, patch=16),
    "ViT-H-14": partial(_vit_h, patch=14),
    "ViT-H-14-378": partial(_vit_h, patch=14, image=378),
    "ViT-g-14": partial(_vit, 1024, 1408, 40, 14, head=88, mlp=4.3637, text=(1024, 24)),
    "ViT-bigG-14": partial(_vit, 1280, 1664, 48, 14, head=104, mlp=4.9231, text=(1280, 32)),
    "ViT-e-14": partial(_vit, 1280, 1792, 56, 14, head=112, mlp=8.5715, text=(1280, 36)),
    "coca_debug": coca_debug,
    "coca_base": _coca_base,
    "coca_ViT-B-32": partial(_coca_vit, "ViT-B-32", 512, 8, 12),
    "coca_ViT-L-14": partial(_coca_vit, "ViT-L-14", 768, 12, 12),
    "ViT-L-14-CLIPA": partial(_clipa, "ViT-L-14"),
    "ViT-L-14-CLIPA-336": partial(_clipa, "ViT-L-14", 336),
    "ViT-H-14-CLIPA": partial(_clipa, "ViT-H-14"),
    "ViT-H-14-CLIPA-336": partial(_clipa, "ViT-H-14", 336),
    "ViT-bigG-14-CLIPA": partial(_clipa, "ViT-bigG-14"),
    "ViT-bigG-14-CLIPA-336": partial(_clipa, "ViT-bigG-14", 336),
}

_SIGLIP_MODELS = {  # name -> what timm calls the image tower
    "ViT-B-16": ("base_patch16", (224, 256, 384, 512)),
    "ViT-L-16": ("large_patch16", (256, 384)),
    "ViT-SO400M-14": ("so400m_patch14", (224, 378, 384)),
}
_SIGLIP2_MODELS = {
    "ViT-B-32": ("base_patch32", (256,)),
    "ViT-B-16": ("base_patch16", (224, 256, 384, 512)),
    "ViT-L-16": ("large_patch16", (256, 384, 512)),
    "ViT-SO400M-14": ("so400m_patch14", (224, 378)),
    "ViT-SO400M-16": ("so400m_patch16", (256, 384, 512)),
    "ViT-gopt-16": ("giantopt_patch16", (256, 384)),
}


def _register_siglip() -> None:
    for base, (tower, sizes) in _SIGLIP_MODELS.items():
        for size in sizes:
            name = f"{base}-SigLIP" + ("" if size == 224 else f"-{size}")
            context = 16 if name == "ViT-SO400M-14-SigLIP" else 64
            PRESETS[name] = partial(_siglip, f"vit_{tower}_siglip_{size}", "ViT-B-16-SigLIP", context=context)
    PRESETS["ViT-B-16-SigLIP-i18n-256"] = partial(
        _siglip, "vit_base_patch16_siglip_256", "ViT-B-16-SigLIP-i18n-256", vocab=250000
    )
    for base, (tower, sizes) in _SIGLIP2_MODELS.items():
        for size in sizes:
            name = f"{base}-SigLIP2" + ("" if size == 224 else f"-{size}")
            text = 1152 if "gopt" in name else 0
            PRESETS[name] = partial(_siglip, f"vit_{tower}_siglip_{size}", name, vocab=256000, text=text, tanh=True)


_register_siglip()


def is_named(name: str) -> bool:
    """Whether there is a config called `name`."""
    return name.removesuffix(_QUICK_GELU) in PRESETS


def get_config(name: str) -> CLIPConfig:
    """The config called `name`; "-quickgelu" behind a name, as in open_clip, is OpenAI's activation.

    Raises ValueError naming the nearest model when there is none of that name.
    """
    base = name.removesuffix(_QUICK_GELU)
    if not is_named(name):
        raise ValueError(f"unknown model {name!r}{nearest(base, PRESETS)}")
    return replace(PRESETS[base](), quick_gelu=base != name)
