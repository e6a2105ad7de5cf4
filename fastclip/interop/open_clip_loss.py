"""open_clip's losses in linear memory, wherever they were imported and whoever makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastclip.interop.drop_in import DropIn, Replacement, as_in_a_product, left_alone, library
from fastclip.losses import ClipLoss, DistillClipLoss, SigLipLoss

# what a subclass may override to change the loss; it is then no longer the one we know
_HOOKS = ("get_logits", "get_ground_truth", "dist_loss", "_loss")


def open_clip_losses(impl: str = "auto") -> DropIn:
    """A drop-in for open_clip's `ClipLoss`, `CoCaLoss`, `DistillClipLoss` and `SigLipLoss`: same value and gradients in
    O(N) memory, on all ranks, with `accum_freq`, and in losses that exist already.

    It replaces the classes' `forward`, so it reaches the losses of `create_loss` (open_clip's releases) and those of
    its tasks (`CLIPTask` and the others of its main) alike, and what your own code has imported by name. A subclass
    that overrides how the logits are made, and a loss over horovod, run open_clip's code, with a warning.

    Args:
        impl: as `contrastive_loss`.
    """

    def find() -> list[Replacement]:
        theirs = library("open_clip", "open_clip_torch", "loss")
        served: dict[Any, Callable[[Any], nn.Module]] = {
            theirs.ClipLoss: lambda loss: ClipLoss(**_ranks(loss), **_gathering(loss), impl=impl),
            theirs.DistillClipLoss: lambda loss: DistillClipLoss(**_ranks(loss), **_gathering(loss), impl=impl),
            theirs.SigLipLoss: lambda loss: SigLipLoss(**_ranks(loss), dist_impl=loss.dist_impl, impl=impl),
        }  # CoCaLoss calls ClipLoss.forward
        return [Replacement(kind, "forward", _forward(kind, ours)) for kind, ours in served.items()]

    return DropIn("open_clip_losses", find)


def _ranks(loss: Any) -> dict[str, Any]:
    return {"rank": loss.rank, "world_size": loss.world_size}


def _gathering(loss: Any) -> dict[str, Any]:
    return {"local_loss": loss.local_loss, "gather_with_grad": loss.gather_with_grad}


def _forward(kind: type, ours: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    def make(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, image_features: Tensor, text_features: Tensor, *args: Any, **kwargs: Any) -> Any:
            reason = _why_not(self, kind)
            if reason:
                left_alone(type(self).__name__, reason)
                return theirs(self, image_features, text_features, *args, **kwargs)
            return ours(self)(*as_in_a_product(image_features, text_features), *args, **kwargs)

        return forward

    return make


def _why_not(loss: Any, kind: type) -> str | None:
    """Why this loss is not the one that `kind` defines, or None."""
    if getattr(loss, "use_horovod", False):
        return "it gathers over horovod"
    changed = [name for name in _HOOKS if getattr(type(loss), name, None) is not getattr(kind, name, None)]
    return f"it overrides {changed[0]}" if changed else None
