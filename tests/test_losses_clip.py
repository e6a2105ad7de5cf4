"""`ClipLoss` on several gloo ranks: open_clip's four kinds of gathering, by formula and beside the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from contrastive_loss_helpers import run_on_ranks
from peers import open_clip_module
from torch import Tensor

from fastclip.losses import ClipLoss
from fastclip.testing import clip_features, value_and_gradients

N, D, SCALE = 12, 7, 30.0


def own(x: Tensor) -> Tensor:
    n = len(x) // dist.get_world_size()
    return x.detach()[dist.get_rank() * n :][:n].clone().requires_grad_()


def gathered(x: Tensor, with_grad: bool) -> Tensor:
    if with_grad:
        return torch.cat(dist_nn.all_gather(x))
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def open_clip_formula(image: Tensor, text: Tensor, scale: Tensor, local_loss: bool, gather_with_grad: bool) -> Tensor:
    """open_clip's ClipLoss with its matrices, from the semantics of its two switches."""
    rank, n = dist.get_rank(), len(image)
    all_image, all_text = gathered(image, gather_with_grad), gathered(text, gather_with_grad)
    if not gather_with_grad and not local_loss:
        all_image, all_text = (
            torch.cat([everyone[: rank * n], mine, everyone[(rank + 1) * n :]])
            for everyone, mine in ((all_image, image), (all_text, text))
        )
    if local_loss:
        per_image, per_text = scale * image @ all_text.T, scale * text @ all_image.T
    else:
        per_image = scale * all_image @ all_text.T
        per_text = per_image.T
    labels = torch.arange(len(per_image)) + (rank * n if local_loss else 0)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


GATHERS = [(local_loss, gather_with_grad) for local_loss in (False, True) for gather_with_grad in (False, True)]


def with_formula() -> list[list[list[Any]]]:
    """[ours, theirs] by kind of gathering: the loss and its three gradients on this rank."""
    image, text, scale = clip_features(N, D, dtype=torch.float64, scale=SCALE)
    leaves = (own(image), own(text), scale)
    results = []
    for kind in GATHERS:
        module = ClipLoss(*kind, rank=dist.get_rank(), world_size=dist.get_world_size())
        ours = value_and_gradients(module, leaves)
        theirs = value_and_gradients(lambda *x, kind=kind: open_clip_formula(*x, *kind), leaves)
        results.append([[x.numpy() for x in values] for values in (ours, theirs)])
    return results


def assert_as_open_clip(ranks: list[list[list[list[Any]]]]) -> None:
    """The loss and the features' gradients on every rank, and the scale's on average."""
    for kind, results in zip(GATHERS, zip(*ranks, strict=True), strict=True):
        for ours, theirs in results:
            for mine, other in zip(ours[:3], theirs[:3], strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-14, err_msg=str(kind))
        ours, theirs = (np.mean([result[way][3] for result in results]) for way in (0, 1))
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, err_msg=str(kind))


def test_clip_loss_gathers_as_open_clip() -> None:
    assert_as_open_clip(run_on_ranks(2, with_formula))


def with_open_clip() -> list[list[list[Any]]]:
    """[ours, theirs] by kind of gathering: the loss and its three gradients on this rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    image, text, scale = clip_features(N, D, dtype=torch.float64, scale=SCALE)
    leaves = (own(image), own(text), scale)
    results = []
    for kind in GATHERS:
        both = (module(*kind, cache_labels=True, rank=rank, world_size=world_size) for module in clip_losses())
        results.append([[x.numpy() for x in value_and_gradients(loss, leaves)] for loss in both])
    return results


def clip_losses() -> tuple[Any, Any]:
    return ClipLoss, open_clip_module("open_clip.loss").ClipLoss


@pytest.mark.peer
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_clip_loss_is_open_clips(world_size: int) -> None:
    clip_losses()  # skips where open_clip is missing
    assert_as_open_clip(run_on_ranks(world_size, with_open_clip))
