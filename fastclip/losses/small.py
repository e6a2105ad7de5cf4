"""When a batch is small enough for other ways than a large one's."""

import torch
from torch import Tensor

from fastclip.ops import _extension

IN_CACHE = 4 << 20  # bytes of logits that the CPU keeps in any case: they are still near when backward comes


def has_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_made_at_once(image_features: Tensor, text_features: Tensor, scale: Tensor, impl: str) -> bool:
    """Whether the plain mean loss and its gradient are best made in one call of the compiled kernel."""
    n, m = image_features.shape[0], text_features.shape[0]
    return (
        not torch.compiler.is_compiling()
        and n == m
        and n * m * 4 <= IN_CACHE
        and image_features.device.type == "cpu"
        and image_features.dtype in (torch.float32, torch.bfloat16)
        and impl in ("auto", "cpu")
        and has_gradient(image_features, text_features, scale)
        and _extension.load() is None
    )
