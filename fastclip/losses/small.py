"""When a batch is small enough for other ways than a large one's."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastclip.ops import _cuda, _extension
from fastclip.ops._tuned import Choice

IN_CACHE = 4 << 20  # bytes of logits that the CPU keeps in any case: they are still near when backward comes
LAUNCHES = 8192  # pairs up to which a GPU's time goes into launches rather than products


def has_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_made_at_once(
    image_features: Tensor, text_features: Tensor, scale: Tensor, impl: str, measured: Callable[..., Choice | None]
) -> bool:
    """Whether the plain mean loss and its gradient are best made in one call of the compiled kernels; `measured` is
    the op's."""
    n, m = image_features.shape[0], text_features.shape[0]
    if torch.compiler.is_compiling() or n != m or not has_gradient(image_features, text_features, scale):
        return False
    if image_features.device.type == "cuda":
        is_taken = n <= LAUNCHES and image_features.dtype in (torch.float16, torch.bfloat16)
        if not is_taken or impl not in ("auto", "cuda") or _cuda.why_not("cuda") is not None:
            return False
        choice = measured("cuda", image_features.dtype, n, m, image_features.shape[1]) if impl == "auto" else None
        return choice is None or choice.order[0] == "cuda"
    return (
        n * m * 4 <= IN_CACHE
        and image_features.device.type == "cpu"
        and image_features.dtype in (torch.float32, torch.bfloat16)
        and impl in ("auto", "cpu")
        and _extension.load() is None
    )
