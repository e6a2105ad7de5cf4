"""Inputs, textbook and truth for the tests of the sigmoid loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.testing import clip_features

NAMES = ("loss", "d_image_features", "d_text_features", "d_logit_scale", "d_logit_bias")
KINDS = ("random", "clip", "converged", "permuted", "duplicates", "zero")


def sigmoid_inputs(
    n: int, d: int, *, kind: str = "random", scale: float = 10.0, bias: float = -10.0, dtype: torch.dtype, device="cpu"
) -> tuple[Tensor, ...]:
    """(image features, text features, scale, bias), leaves that require a gradient."""
    image, text, logit_scale = clip_features(n, d, kind=kind, scale=scale, dtype=dtype, device=device)
    return image, text, logit_scale, torch.full_like(logit_scale, bias).requires_grad_()


def positives(n: int, group_ids: Tensor | None, device: torch.device) -> Tensor:
    """(n, n) bool: the own pair, or the pairs of one group."""
    own = torch.eye(n, dtype=torch.bool, device=device)
    return own if group_ids is None else own | (group_ids[:, None] == group_ids)


def eager_sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, group_ids: Tensor | None = None
) -> Tensor:
    """SigLIP's loss with its matrices, in the features' dtype: what everybody writes."""
    logits = scale.to(image.dtype) * image @ text.T + bias.to(image.dtype)
    signs = 2 * positives(len(image), group_ids, image.device).to(image.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def exact_sigmoid_rows(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, group_ids: Tensor | None = None
) -> Tensor:
    """(n,) row sums in fp64, by another formula: log(e^0 + e^x)."""
    z = scale.double() * image.double() @ text.double().T + bias.double()
    x = torch.where(positives(len(image), group_ids, image.device), -z, z)
    return torch.logaddexp(torch.zeros_like(x), x).sum(1)


def exact_sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, group_ids: Tensor | None = None
) -> Tensor:
    return exact_sigmoid_rows(image, text, scale, bias, group_ids).mean()


def sigmoid_loss_units(inputs: tuple[Tensor, ...], group_ids: Tensor | None = None) -> dict[str, float]:
    """For `assert_within_budget`: the norm of what is summed to give each value, however much of it cancels."""
    image, text, scale, bias = (x.detach().double() for x in inputs)
    n, cosines = len(image), image @ text.T
    z = scale * cosines + bias
    size = torch.where(positives(n, group_ids, z.device), -z, z).sigmoid() / n
    d_image, d_text = (size @ text.norm(dim=1)).norm() * scale, (size.T @ image.norm(dim=1)).norm() * scale
    loss = 1 + exact_sigmoid_loss(image, text, scale, bias, group_ids)
    units = (loss, d_image, d_text, (size * cosines.abs()).sum(), size.sum())
    return {name: unit.item() for name, unit in zip(NAMES, units, strict=True)}
