"""What the losses refuse, and how they say it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.distributed import Layout, even_layout, gather_counts


def check_inputs(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    directions: str,
    reduction: str,
    check_values: bool,
) -> None:
    """What every loss over pairs takes: features of one shape, a scale, and the common options."""
    check_features(image_features, text_features)
    if text_features.shape != image_features.shape:
        wanted = f"{tuple(image_features.shape)} as image_features"
        raise ValueError(f"text_features has shape {tuple(text_features.shape)}, must be {wanted}")
    check_scale(logit_scale)
    check_choice("directions", directions, ("both", "image", "text"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if check_values:
        check_finite(image_features=image_features, text_features=text_features, logit_scale=logit_scale)


def check_features(image_features: Tensor, text_features: Tensor) -> None:
    """(N, D) and (M, D), of one floating-point type and on one device."""
    image, text = image_features, text_features
    for name, x in (("image_features", image), ("text_features", text)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is {type(x).__name__}, must be a tensor")
        if x.layout != torch.strided:
            raise ValueError(f"{name} is a {x.layout} tensor, must be a dense one")
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must be (N, D) with N and D at least 1")
    if text.shape[1] != image.shape[1]:
        raise ValueError(f"text_features has D = {text.shape[1]}, must be {image.shape[1]} as image_features")
    if not image.is_floating_point():
        raise ValueError(f"image_features is {image.dtype}, must be a floating-point type")
    if text.dtype != image.dtype or text.device != image.device:
        given, wanted = (f"{x.dtype} on {x.device}" for x in (text, image))
        raise ValueError(f"text_features is {given}, must be {wanted} as image_features")


def check_scale(logit_scale: Tensor) -> None:
    if not isinstance(logit_scale, Tensor) or logit_scale.numel() != 1 or logit_scale.ndim > 1:
        given = _shape(logit_scale) if isinstance(logit_scale, Tensor) else repr(logit_scale)
        raise ValueError(f"logit_scale is {given}, must be a tensor of shape () or (1,): the exponentiated scale")
    if not logit_scale.is_floating_point():
        raise ValueError(f"logit_scale is {logit_scale.dtype}, must be a floating-point type")


def check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        *most, last = (repr(choice) for choice in choices)
        raise ValueError(f"{name} is {given!r}, must be {', '.join(most)} or {last}")


def check_finite(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} has values that are not finite, must be all finite")


def check_contrastive(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    group_ids: Any,
    group_mode: str,
    weights: Tensor | None,
    label_smoothing: float,
    directions: str,
    reduction: str,
    memory_budget: int,
    group: Any,
    ring: bool,
    check_values: bool,
) -> dict[str, Tensor]:
    """What `contrastive_loss` takes. Returns what could be wrong with the values that nobody has looked at yet: message
    to whether it is so, 0-dim bool."""
    check_features(image_features, text_features)
    check_scale(logit_scale)
    n, m, device = image_features.shape[0], text_features.shape[0], image_features.device
    if labels is not None:
        _check_vector("labels", labels, n, device, torch.int64)
    if m < n:
        raise ValueError(f"text_features has {m} rows, must have at least {n}: every image has a text of its own")
    image_ids, text_ids = _check_groups(group_ids, n, m, labels is not None, device)
    check_choice("group_mode", group_mode, ("positive", "ignore"))
    if weights is not None:
        _check_vector("weights", weights, n, device, None)
    _check_smoothing(label_smoothing, group_ids is not None and group_mode == "ignore")
    check_choice("directions", directions, ("both", "image", "text"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if not isinstance(memory_budget, int) or memory_budget < 0:
        raise ValueError(f"memory_budget is {memory_budget!r}, must be a number of bytes, at least 0")
    if ring and memory_budget:
        raise ValueError(f"memory_budget is {memory_budget}, must be 0 with ring: which is there to hold less")
    if ring and group is None:
        raise ValueError("ring is True, must be False without a group: there are no ranks to pass texts to")
    if check_values:
        check_finite(image_features=image_features, text_features=text_features, logit_scale=logit_scale)
    faults = _value_faults(logit_scale, labels, image_ids, text_ids, weights, m)
    if check_values or (device.type == "cpu" and not torch.compiler.is_compiling()):
        _raise_faults(faults)
        return {}
    return faults


def check_index(index: Tensor, image_features: Tensor, samples: int) -> dict[str, Tensor]:
    """The number of each image's sample in a data set; returns as `check_contrastive`."""
    _check_vector("index", index, image_features.shape[0], image_features.device, torch.int64)
    faults = {
        "index has values that number no sample, must be at least 0 and below `samples`": (
            (index < 0) | (index >= samples)
        ).any()
    }
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        _raise_faults(faults)
        return {}
    return faults


def _check_groups(
    group_ids: Any, n: int, m: int, has_labels: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The ids of the images and of the texts."""
    if group_ids is None:
        return None, None
    if isinstance(group_ids, Tensor):
        if has_labels or n != m:
            reason = "with labels" if has_labels else f"for {n} images and {m} texts"
            raise ValueError(f"group_ids is one tensor, must be a pair (image ids, text ids) {reason}")
        _check_vector("group_ids", group_ids, n, device, torch.int64)
        return group_ids, group_ids
    if not isinstance(group_ids, (tuple, list)) or len(group_ids) != 2:
        raise ValueError(f"group_ids is {type(group_ids).__name__}, must be a tensor or a pair of tensors")
    _check_vector("group_ids[0]", group_ids[0], n, device, torch.int64)
    _check_vector("group_ids[1]", group_ids[1], m, device, torch.int64)
    return group_ids[0], group_ids[1]


def _check_smoothing(label_smoothing: float, ignores: bool) -> None:
    if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing!r}, must be a number of at least 0 and below 1")
    if label_smoothing and ignores:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, must be 0 with group_mode='ignore': what is left out of the "
            "denominator has no probability to be given"
        )


def _check_vector(name: str, x: Any, length: int, device: torch.device, dtype: torch.dtype | None) -> None:
    """dtype None: any floating-point type."""
    if not isinstance(x, Tensor) or x.ndim != 1 or x.shape[0] != length:
        given = _shape(x) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {given}, must be a tensor of shape ({length},)")
    if (not x.is_floating_point()) if dtype is None else x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype}, must be {dtype or 'a floating-point type'}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, must be on {device} as image_features")


def _shape(x: Tensor) -> str:
    return f"a tensor of shape {tuple(x.shape)}"


def _value_faults(
    logit_scale: Tensor,
    labels: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    weights: Tensor | None,
    texts: int,
) -> dict[str, Tensor]:
    """What no shape or type shows: message to whether it is so (0-dim bool), computed where the tensors are.

    No message holds a size: that would fix it in a compiled graph.
    """
    faults = {"logit_scale is not positive, must be above 0: the exponentiated scale": (logit_scale <= 0).any()}
    if labels is not None:
        counts = labels.new_zeros(texts).index_add_(0, labels.clamp(0, texts - 1), torch.ones_like(labels))
        faults["labels has values that number no text, must be at least 0 and below how many this rank brings"] = (
            (labels < 0) | (labels >= texts)
        ).any()
        faults["labels has the same value twice, must be distinct: every image has a text of its own"] = (
            counts > 1
        ).any()
    if image_ids is not None and text_ids is not None and image_ids is not text_ids:
        own = text_ids[: len(image_ids)] if labels is None else text_ids[labels.clamp(0, texts - 1)]
        faults["group_ids gives an image another number than its own text, must give both the same"] = (
            image_ids != own
        ).any()
    if weights is not None:
        faults["weights has negative values, must be at least 0"] = (weights < 0).any()
    return faults


def _raise_faults(faults: dict[str, Tensor]) -> None:
    """Waits for the device."""
    for message, is_so in faults.items():
        if is_so:
            raise ValueError(message)


def agreed_layout(
    check: Callable[[], dict[str, Tensor]],
    image_features: Tensor,
    text_features: Tensor,
    group: dist.ProcessGroup | None,
    asks: bool,
) -> tuple[Layout, dict[str, Tensor]]:
    """Where this rank's rows lie among those of the group, and what `check` returns.

    asks: the ranks tell each other how much they bring and whether their check passed, in one small collective and a
        wait for it, so that an error on one is an error on all; on the CPU they always do. Otherwise all are taken to
        bring as much.
    """
    if group is None or not (asks or image_features.device.type == "cpu"):
        faults = check()
        return even_layout(image_features.shape[0], text_features.shape[0], group), faults
    error: ValueError | None = None
    faults = {}
    try:
        faults = check()
    except ValueError as caught:
        error = caught
    own = (len(image_features), len(text_features), int(error is not None))
    counts = gather_counts(own, image_features.device, group)
    if error is not None:
        raise error
    refused = [rank for rank, (*_, failed) in enumerate(counts) if failed]
    if refused:
        raise ValueError(
            f"contrastive_loss: the input of ranks {refused} of the group was refused, see the errors there"
        )
    images, texts, _ = (tuple(column) for column in zip(*counts, strict=True))
    return Layout(group, dist.get_rank(group), images, texts), faults
