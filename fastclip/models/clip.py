"""CLIP: an image tower, a text tower and a learned temperature (Radford et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.models.config import CLIPConfig
from fastclip.models.resnet import ModifiedResNet
from fastclip.models.text import TextTower
from fastclip.models.vision import VisionTransformer
from fastclip.ops.attention.packing import PackedText

MAX_LOGIT_SCALE = 100.0


class CLIP(TextTower):
    """The whole model. State-dict names and shapes are those of OpenAI's CLIP and of open_clip's `CLIP` class.

    `logit_scale` holds a logarithm. The parameter has shape (1,), since DeepSpeed cannot partition one of no
    dimension, and is written and read as a 0-dim entry of the state dict.
    Under ZeRO-3 call the model itself, not its methods: only `forward` gathers the parameters.
    """

    def __init__(self, config: CLIPConfig, packed_text: bool = True) -> None:
        super().__init__(config.text, config.embed_dim, config.quick_gelu)
        self.config = config
        self.packed_text = packed_text
        tower = ModifiedResNet if config.vision.is_resnet else VisionTransformer
        self.visual: nn.Module = tower(config.vision, config.embed_dim, config.quick_gelu)
        self.logit_scale = nn.Parameter(torch.full((1,), config.init_logit_scale))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Normalised images (B, 3, S, S), any float dtype -> (B, embed_dim), of unit length with `normalize`."""
        size = self.config.vision.image_size
        if image.dim() != 4 or image.shape[1:] != (3, size, size) or not image.is_floating_point():
            raise ValueError(
                f"image must be normalised floats of shape (B, 3, {size}, {size}), was {image.dtype} "
                f"{tuple(image.shape)}"
            )
        features = self.visual(image.to(self.logit_scale.dtype))
        return unit_length(features) if normalize else features

    def encode_text(self, text: Tensor | PackedText, normalize: bool = False) -> Tensor:
        """Token ids (B, L), zeros behind end-of-text, or packed captions -> (B, embed_dim)."""
        features = self.text_features(text, self.packed_text)
        return unit_length(features) if normalize else features

    def forward(
        self, image: Tensor | None = None, text: Tensor | PackedText | None = None, output_dict: bool = False
    ) -> tuple[Tensor | None, Tensor | None, Tensor] | dict[str, Tensor]:
        """(image_features, text_features, logit_scale), features of unit length, as open_clip returns them.

        The scale is exponentiated, at most 100 (its gradient is zero above), 0-dim and at least fp32. The features of
        an absent input are None; with `output_dict` their key is left out.
        """
        image_features = None if image is None else self.encode_image(image, normalize=True)
        text_features = None if text is None else self.encode_text(text, normalize=True)
        logit_scale = _at_least_fp32(self.logit_scale).exp().clamp(max=MAX_LOGIT_SCALE).squeeze(0)
        if not output_dict:
            return image_features, text_features, logit_scale
        outputs = {"image_features": image_features, "text_features": text_features, "logit_scale": logit_scale}
        return {name: value for name, value in outputs.items() if value is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scale = destination[prefix + "logit_scale"]
        if scale.numel() == 1:  # ZeRO-3 leaves an empty placeholder
            destination[prefix + "logit_scale"] = scale.squeeze()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        scale = state_dict.get(prefix + "logit_scale")
        if scale is not None and scale.dim() == 0:
            state_dict[prefix + "logit_scale"] = scale[None]
        super()._load_from_state_dict(state_dict, prefix, *args)


def unit_length(features: Tensor) -> Tensor:
    """x / |x| along the last dimension, computed in fp32 or better and returned in the dtype of x."""
    return F.normalize(_at_least_fp32(features), dim=-1).to(features.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
