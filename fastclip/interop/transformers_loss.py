"""The loss of transformers' CLIP and SigLIP models over the batch of all ranks, in linear memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fastclip.errors import UserError
from fastclip.interop.drop_in import DropIn, Replacement, as_in_a_product, library
from fastclip.losses import contrastive_loss, sigmoid_loss

_OLDEST = 5  # the release in which get_image_features began to return an output and not a tensor


def transformers_losses(group: dist.ProcessGroup | None = None, uneven: bool = False, impl: str = "auto") -> DropIn:
    """A drop-in for the loss of `CLIPModel`, `SiglipModel` and `Siglip2Model` called with `return_loss=True`.

    transformers compares the pairs of one process alone; this compares those of all, as CLIP and SigLIP were trained,
    and its gradient, averaged over ranks by DDP or DeepSpeed, is that of the full batch. On one process the value is
    transformers' own. The output holds the loss and the embeddings; its logits, the N x N matrix, are None. Without
    `return_loss` nothing changes. Enable it before a Trainer or Accelerator wraps the model.

    Args:
        group: process group of the ranks that share a batch; None is the default group, or this process alone where
            torch.distributed has not been started.
        uneven: the ranks may bring different numbers of pairs (a last batch).
        impl: as `contrastive_loss`.
    """

    def find() -> list[Replacement]:
        transformers = library("transformers", "transformers")
        if int(transformers.__version__.partition(".")[0]) < _OLDEST:
            raise UserError(f"transformers is {transformers.__version__}, must be {_OLDEST}.0 or newer")

        def clip(model: Any, image: Tensor, text: Tensor) -> Tensor:
            scale = model.logit_scale.exp()
            return contrastive_loss(image, text, scale, group=_group(group), uneven=uneven, impl=impl)

        def siglip(model: Any, image: Tensor, text: Tensor) -> Tensor:
            scale, bias = model.logit_scale.exp(), model.logit_bias
            return sigmoid_loss(image, text, scale, bias, group=_group(group), impl=impl)

        models = {"CLIPModel": clip, "SiglipModel": siglip, "Siglip2Model": siglip}
        return [Replacement(getattr(transformers, name), "forward", _forward(loss)) for name, loss in models.items()]

    return DropIn("transformers_losses", find)


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group, else the default one if it has more ranks than this."""
    if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return group


def _forward(loss_of: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any], Any]:
    def make(theirs: Callable[..., Any]) -> Callable[..., Any]:
        from transformers.utils.generic import can_return_tuple

        arguments = inspect.signature(theirs)
        makes_output = can_return_tuple(lambda model, **given: _output(model, loss_of, **given))

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = arguments.bind(self, *args, **kwargs).arguments
            if not given.pop("return_loss", None):
                return theirs(self, *args, **kwargs)
            given.pop(next(iter(arguments.parameters)))
            return makes_output(self, **given, **given.pop("kwargs", {}))

        return forward

    return make


def _output(model: Any, loss_of: Callable[[Any, Tensor, Tensor], Tensor], **given: Any) -> Any:
    """The model's output with its loss, without its logits."""
    image_names, text_names = (
        inspect.signature(method).parameters for method in (model.get_image_features, model.get_text_features)
    )
    rest = {name: value for name, value in given.items() if name not in image_names and name not in text_names}
    vision, text = (
        method(**{name: value for name, value in given.items() if name in names}, **rest)
        for method, names in ((model.get_image_features, image_names), (model.get_text_features, text_names))
    )
    image_embeds, text_embeds = (F.normalize(x.pooler_output, dim=-1) for x in (vision, text))
    features = as_in_a_product(image_embeds, text_embeds.to(image_embeds.device))
    return _output_class(model)(
        loss=loss_of(model, *features),
        text_embeds=text_embeds,
        image_embeds=image_embeds,
        text_model_output=text,
        vision_model_output=vision,
    )


def _output_class(model: Any) -> Any:
    """CLIPOutput of CLIPModel, and so on: beside the model's class, in the module that defines it."""
    home = next(kind for kind in type(model).__mro__ if kind.__name__ in ("CLIPModel", "SiglipModel", "Siglip2Model"))
    module = inspect.getmodule(home)
    return getattr(module, home.__name__.replace("Model", "Output"))
