"""What the losses refuse, and how they say it."""

import torch
from torch import Tensor


def check_inputs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    directions: str,
    reduction: str,
    check_values: bool,
) -> None:
    image, text = image_features, text_features
    if image.ndim != 2 or 0 in image.shape:
        raise ValueError(f"image_features has shape {tuple(image.shape)}, must be (N, D) with N and D at least 1")
    if text.shape != image.shape:
        raise ValueError(f"text_features has shape {tuple(text.shape)}, must be {tuple(image.shape)} as image_features")
    if not image.is_floating_point():
        raise ValueError(f"image_features is {image.dtype}, must be a floating-point type")
    if text.dtype != image.dtype or text.device != image.device:
        given, wanted = (f"{x.dtype} on {x.device}" for x in (text, image))
        raise ValueError(f"text_features is {given}, must be {wanted} as image_features")
    if not isinstance(logit_scale, Tensor) or logit_scale.numel() != 1 or logit_scale.ndim > 1:
        given = (
            f"a tensor of shape {tuple(logit_scale.shape)}" if isinstance(logit_scale, Tensor) else repr(logit_scale)
        )
        raise ValueError(f"logit_scale is {given}, must be a tensor of shape () or (1,): the exponentiated scale")
    if directions not in ("both", "image", "text"):
        raise ValueError(f"directions is {directions!r}, must be 'both', 'image' or 'text'")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, must be 'mean', 'sum' or 'none'")
    if check_values:
        for name, x in (("image_features", image), ("text_features", text), ("logit_scale", logit_scale)):
            if not torch.isfinite(x).all():
                raise ValueError(f"{name} has values that are not finite, must be all finite")
