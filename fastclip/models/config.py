"""What a CLIP model is made of: frozen dataclasses that read and write open_clip's JSON (`open_clip_config.json`).

Field names are open_clip's where it has the field, so that its model configs load here and ours load there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_T = TypeVar("_T")


@dataclass(frozen=True)
class VisionConfig:
    """An image tower: a Vision Transformer, or CLIP's ModifiedResNet when `layers` is a tuple."""

    image_size: int = 224
    """Height and width of the input in pixels."""
    layers: int | tuple[int, ...] = 12
    """Number of Transformer blocks, or the number of bottlenecks in each of the four stages of a ModifiedResNet."""
    width: int = 768
    """Channels of a token; for a ModifiedResNet the channels behind its stem."""
    head_width: int = 64
    """Channels of one attention head."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP, as a multiple of `width` (rounded down)."""
    patch_size: int = 16
    """Pixels along the edge of a patch; not used by a ModifiedResNet."""
    pool_type: str = "tok"
    """"tok" pools the class token; "avg" the mean of the patch tokens (behind ln_post, as open_clip does)."""
    patch_dropout: float = 0.0
    """Share of patch tokens left out of each training image (FLIP, Li et al. 2023)."""
    conv_stem: tuple[int, ...] = ()
    """Channels of stride-2 3x3 convolutions in front of the patch product (Xiao et al. 2021); not in open_clip."""

    def __post_init__(self) -> None:
        _positive(self, "image_size", "width", "head_width", "mlp_ratio", "patch_size")
        object.__setattr__(self, "layers", tuple(self.layers) if isinstance(self.layers, list) else self.layers)
        object.__setattr__(self, "conv_stem", tuple(self.conv_stem))
        if self.width % self.head_width and not self.is_resnet:
            raise ValueError(f"width must be a multiple of head_width ({self.head_width}), was {self.width}")
        if self.pool_type not in ("tok", "avg"):
            raise ValueError(f'pool_type must be "tok" or "avg", was {self.pool_type!r}')
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"patch_dropout must be in [0, 1), was {self.patch_dropout}")
        if self.is_resnet:
            self._check_resnet()
        elif self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size ({self.patch_size}), was {self.image_size}")
        if self.patch_size % 2 ** len(self.conv_stem):
            raise ValueError(
                f"patch_size must be a multiple of {2 ** len(self.conv_stem)}, the stride of conv_stem "
                f"{self.conv_stem}, was {self.patch_size}"
            )

    def _check_resnet(self) -> None:
        assert isinstance(self.layers, tuple)
        if len(self.layers) != 4:
            raise ValueError(f"layers of a ModifiedResNet must name its four stages, was {self.layers}")
        if self.image_size % 32:
            raise ValueError(f"image_size of a ModifiedResNet must be a multiple of 32, was {self.image_size}")
        if self.width * 32 % self.head_width:
            raise ValueError(f"32 * width must be a multiple of head_width ({self.head_width}), was {32 * self.width}")
        if self.conv_stem or self.patch_dropout or self.pool_type != "tok":
            raise ValueError("conv_stem, patch_dropout and pool_type are options of a Vision Transformer alone")

    @property
    def is_resnet(self) -> bool:
        return isinstance(self.layers, tuple)


@dataclass(frozen=True)
class TextConfig:
    """The causal text Transformer, pooled at the end-of-text token."""

    context_length: int = 77
    """Most tokens of a caption, start and end of text included."""
    vocab_size: int = 49408
    """Number of token ids; end-of-text is the largest id a caption holds."""
    width: int = 512
    """Channels of a token."""
    heads: int = 8
    """Number of attention heads."""
    layers: int = 12
    """Number of Transformer blocks."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP, as a multiple of `width` (rounded down)."""

    def __post_init__(self) -> None:
        _positive(self, "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads ({self.heads}), was {self.width}")


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers, the space they share, and how images are normalised for them."""

    embed_dim: int = 512
    """Dimension of the shared space of image and text features."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The image tower."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text tower."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x) instead of GELU: what OpenAI's weights were trained with."""
    init_logit_scale: float = math.log(1 / 0.07)
    """Initial value of the logit_scale parameter, a natural logarithm."""
    image_mean: tuple[float, ...] = OPENAI_MEAN
    """Per-channel mean subtracted from images in [0, 1]."""
    image_std: tuple[float, ...] = OPENAI_STD
    """Per-channel standard deviation images are divided by."""

    def __post_init__(self) -> None:
        _positive(self, "embed_dim")
        for name in ("image_mean", "image_std"):
            value = tuple(float(x) for x in getattr(self, name))
            if len(value) != 3 or (name == "image_std" and min(value) <= 0):
                raise ValueError(f"{name} must be three numbers (positive for image_std), was {value}")
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The content of `open_clip_config.json`: {"model_cfg": ..., "preprocess_cfg": ...}.

        Fields that open_clip does not know are written only where they differ from their default.
        """
        model_cfg = {
            "embed_dim": self.embed_dim,
            "quick_gelu": self.quick_gelu,
            "init_logit_scale": self.init_logit_scale,
            "vision_cfg": _written(self.vision),
            "text_cfg": _written(self.text),
        }
        preprocess_cfg = {"size": self.vision.image_size, "mean": list(self.image_mean), "std": list(self.image_std)}
        return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CLIPConfig:
        """Read what `to_dict` writes, or a bare open_clip model config.

        Raises ValueError naming the nearest key for an unknown one.
        """
        model_cfg = dict(data.get("model_cfg", data))
        preprocess = data.get("preprocess_cfg", {})
        vision = _read(VisionConfig, model_cfg.pop("vision_cfg", {}), "vision_cfg")
        text = _read(TextConfig, model_cfg.pop("text_cfg", {}), "text_cfg")
        known = ("embed_dim", "quick_gelu", "init_logit_scale", "vision_cfg", "text_cfg")
        for key in model_cfg:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in model_cfg{nearest(key, known)}")
        mean, std = preprocess.get("mean", OPENAI_MEAN), preprocess.get("std", OPENAI_STD)
        return cls(vision=vision, text=text, image_mean=mean, image_std=std, **model_cfg)


def nearest(name: str, known: Any) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, was {getattr(config, name)}")


def _written(config: Any) -> dict[str, Any]:
    """A tower's fields as JSON holds them, without the options left at a default that open_clip lacks."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    if not values.get("conv_stem", True):
        del values["conv_stem"]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _read(kind: type[_T], data: dict[str, Any], where: str) -> _T:
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}{nearest(key, known)}")
    return kind(**data)
