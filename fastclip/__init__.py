"""FastCLIP: kernels, encoders, gradient caching and DeepSpeed training for CLIP.

    from fastclip import ClipLoss, GradCache, attention, contrastive_loss, create_model, get_tokenizer

Importing costs torch only: a name is loaded from its room when it is first used, and no triton, deepspeed, compile or
CUDA start happens here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastclip._version import __version__

if TYPE_CHECKING:
    from fastclip.grad_cache import GradCache
    from fastclip.interop.open_clip import create_model_and_transforms, get_tokenizer
    from fastclip.losses import (
        ClipLoss,
        CoCaLoss,
        DistillClipLoss,
        GlobalContrastiveLoss,
        SigLipLoss,
        approximate_contrastive_loss,
        caption_loss,
        contrastive_loss,
        sigmoid_loss,
    )
    from fastclip.models import CLIP, create_model, load_checkpoint
    from fastclip.ops.attention import attention

_ROOMS = {
    "CLIP": "models",
    "ClipLoss": "losses",
    "CoCaLoss": "losses",
    "DistillClipLoss": "losses",
    "GlobalContrastiveLoss": "losses",
    "GradCache": "grad_cache",
    "SigLipLoss": "losses",
    "approximate_contrastive_loss": "losses",
    "attention": "ops.attention",
    "caption_loss": "losses",
    "contrastive_loss": "losses",
    "create_model": "models",
    "create_model_and_transforms": "interop.open_clip",
    "get_tokenizer": "interop.open_clip",
    "load_checkpoint": "models",
    "sigmoid_loss": "losses",
}

__all__ = [
    "CLIP",
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "GlobalContrastiveLoss",
    "GradCache",
    "SigLipLoss",
    "__version__",
    "approximate_contrastive_loss",
    "attention",
    "caption_loss",
    "contrastive_loss",
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "load_checkpoint",
    "sigmoid_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'fastclip' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"fastclip.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
