"""CLIP: an image tower, a text tower and a learned temperature (Radford et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.models.coca import CaptionDecoder, next_tokens
from fastclip.models.config import CLIPConfig, check_choice
from fastclip.models.resnet import ModifiedResNet
from fastclip.models.text import TextTower
from fastclip.models.vision import VisionTransformer
from fastclip.ops.attention.packing import PackedText

MAX_LOGIT_SCALE = 100.0
_SCALARS = ("logit_scale", "logit_bias")
_OWN = (
    "the {} tower of this config is the module {}, which only its code can build: make the model with "
    "fastclip.models.wrap, then fastclip.models.load_weights"
)


class CLIP(TextTower):
    """The whole model. State-dict names and shapes are those of OpenAI's CLIP and of open_clip's `CLIP` class.

    `logit_scale` holds a logarithm; `logit_bias` is there where the config has an `init_logit_bias`. Both parameters
    have shape (1,), since DeepSpeed cannot partition one of no dimension, and are written and read as 0-dim entries of
    the state dict.
    Under ZeRO-3 call the model itself, not its methods: only `forward` gathers the parameters.

    Args:
        packed_text: encode captions at their true length where that is exact (`config.text.why_not_packed`).
        visual: an image tower of one's own, (B, 3, S, S) -> (B, embed_dim); see `fastclip.models.wrapped`.
        text: a text tower of one's own, (B, L) token ids -> (B, embed_dim); it is the submodule `text`.
    """

    def __init__(
        self,
        config: CLIPConfig,
        packed_text: bool = True,
        *,
        visual: nn.Module | None = None,
        text: nn.Module | None = None,
    ) -> None:
        text = text or _wrapped_text(config)
        if text is None:
            super().__init__(config.text, config.embed_dim, config.act(config.text))
        else:
            nn.Module.__init__(self)
            self.text = text
            self.context_length, self.vocab_size = config.text.context_length, config.text.vocab_size
        self.config = config
        self.packed_text = packed_text
        self.visual = visual or _image_tower(config)
        if config.decoder is not None:
            self.text_decoder = CaptionDecoder(config.decoder, config.text.vocab_size, config.act(config.text))
        self.logit_scale = nn.Parameter(torch.full((1,), config.init_logit_scale))
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), float(config.init_logit_bias)))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Normalised images (B, 3, S, S), any float dtype -> (B, embed_dim), of unit length with `normalize`."""
        features = self.visual(self._checked(image))
        return unit_length(features) if normalize else features

    def _checked(self, image: Tensor) -> Tensor:
        size = self.config.vision.image_size
        if image.dim() != 4 or image.shape[1:] != (3, size, size) or not image.is_floating_point():
            raise ValueError(
                f"image must be normalised floats of shape (B, 3, {size}, {size}), was {image.dtype} "
                f"{tuple(image.shape)}"
            )
        return image.to(self.logit_scale.dtype)

    def encode_text(self, text: Tensor | PackedText, normalize: bool = False) -> Tensor:
        """Token ids (B, L), zeros behind end-of-text, or packed captions -> (B, embed_dim)."""
        if not self.config.text.is_wrapped:
            features = self.text_features(text, self.packed_text)
        elif isinstance(text, PackedText):
            raise ValueError(f"text must be padded ids (B, L), was packed: {self.config.text.why_not_packed}")
        else:
            features = self.text(text)
        return unit_length(features) if normalize else features

    def forward(
        self, image: Tensor | None = None, text: Tensor | PackedText | None = None, output_dict: bool = False
    ) -> tuple[Tensor | None, ...] | dict[str, Tensor]:
        """(image_features, text_features, logit_scale), features of unit length, and logit_bias where there is one.

        As open_clip returns them. The scale is exponentiated, at most 100 (its gradient is zero above); scale and bias
        are 0-dim and at least fp32. The features of an absent input are None; with `output_dict` their key is left out.
        A model with a decoder, given both, adds caption_losses (B,), -log p of each caption's tokens, summed, and
        caption_tokens (B,), how many those are: `caption_loss` takes them.
        """
        captions: dict[str, Tensor] = {}
        image_features: Tensor | None
        text_features: Tensor | None
        if self.config.decoder is not None and image is not None and isinstance(text, Tensor):
            image_features, text_features, captions = self._captioned(image, text)
        else:
            image_features = None if image is None else self.encode_image(image, normalize=True)
            text_features = None if text is None else self.encode_text(text, normalize=True)
        logit_scale = _at_least_fp32(self.logit_scale).exp().clamp(max=MAX_LOGIT_SCALE).squeeze(0)
        outputs = {"image_features": image_features, "text_features": text_features, "logit_scale": logit_scale}
        if self.config.init_logit_bias is not None:
            outputs["logit_bias"] = _at_least_fp32(self.logit_bias).squeeze(0)
        outputs |= captions
        if not output_dict:
            return tuple(outputs.values())
        return {name: value for name, value in outputs.items() if value is not None}

    def _captioned(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Features of both, of unit length, and what the decoder says of the captions."""
        if len(image) != len(ids):
            raise ValueError(f"text must have a caption for each of the {len(image)} images, has {len(ids)}")
        image_features, image_tokens = self.visual(self._checked(image), with_tokens=True)
        text_features, text_tokens = self.text_features_and_tokens(ids)
        pad_id = self.config.text.pad_id
        targets, kept = next_tokens(ids, pad_id)
        losses = self.text_decoder(text_tokens[:, :-1][kept], targets, image_tokens, pad_id)
        tokens = (ids[:, 1:] != pad_id).sum(1)
        captions = {"caption_losses": losses, "caption_tokens": tokens.to(losses.dtype)}
        return unit_length(image_features), unit_length(text_features), captions

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in backward instead of keeping them, block by block; open_clip's call."""
        self.set_recompute("full" if enable else "none")

    def set_recompute(self, mode: str) -> None:
        """What backward recomputes instead of keeping it, in both towers and the decoder; gradients stay the same.

        mode: "none"; "selective": what LayerNorm, attention and activation return, no product with a weight more (a
            ModifiedResNet keeps what it keeps); "full": every block. A wrapped tower is asked for "full" through its
            own `set_grad_checkpointing`. Raises ValueError where a tower cannot.
        """
        check_choice("mode", mode, ("none", "selective", "full"))
        towers: list[Any] = [self.visual.transformer if isinstance(self.visual, VisionTransformer) else self.visual]
        towers.append(self.text if self.config.text.is_wrapped else self.transformer)
        towers += [self.text_decoder] if self.config.decoder is not None else []
        for tower in towers:
            if hasattr(tower, "set_recompute"):
                tower.set_recompute(mode)
            elif hasattr(tower, "set_grad_checkpointing"):
                tower.set_grad_checkpointing(mode == "full")
            elif mode == "full":
                raise ValueError(f"mode must not be full: {type(tower).__name__} cannot recompute its activations")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _SCALARS:
            value = destination.get(prefix + name)
            if value is not None and value.numel() == 1:  # ZeRO-3 leaves an empty placeholder
                destination[prefix + name] = value.squeeze()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in _SCALARS:
            value = state_dict.get(prefix + name)
            if value is not None and value.dim() == 0:
                state_dict[prefix + name] = value[None]
        super()._load_from_state_dict(state_dict, prefix, *args)


def unit_length(features: Tensor) -> Tensor:
    """x / |x| along the last dimension, computed in fp32 or better and returned in the dtype of x."""
    return F.normalize(_at_least_fp32(features), dim=-1).to(features.dtype)


def _image_tower(config: CLIPConfig) -> nn.Module:
    if config.vision.timm_model_name:
        from fastclip.models.wrapped import TimmTower

        return TimmTower(config.vision, config.embed_dim)
    if config.vision.module:
        raise ValueError(_OWN.format("image", config.vision.module))
    if config.vision.is_resnet:
        return ModifiedResNet(config.vision, config.embed_dim)
    return VisionTransformer(config.vision, config.embed_dim, config.act(config.vision))


def _wrapped_text(config: CLIPConfig) -> nn.Module | None:
    if config.text.hf_model_name:
        from fastclip.models.wrapped import HFTextTower

        return HFTextTower(config.text, config.embed_dim)
    if config.text.module:
        raise ValueError(_OWN.format("text", config.text.module))
    return None


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
