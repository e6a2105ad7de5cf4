"""The losses on several gloo ranks against one process, and open_clip's four kinds of gathering."""

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

from fastclip.losses import ClipLoss, contrastive_loss
from fastclip.testing import clip_features, value_and_gradients

N, D, SCALE = 12, 7, 30.0
KINDS = ("random", "converged", "permuted")


def own(x: Tensor) -> Tensor:
    n = len(x) // dist.get_world_size()
    return x.detach()[dist.get_rank() * n :][:n].clone().requires_grad_()


def sharded(kind: str, options: dict[str, Any]) -> list[Any]:
    image, text, scale = clip_features(N, D, kind=kind, dtype=torch.float64, scale=SCALE)
    leaves = (own(image), own(text), scale)
    loss, stats = contrastive_loss(*leaves, group=dist.group.WORLD, return_stats=True, **options)
    weights = (
        torch.linspace(1, 2, N, dtype=torch.float64)[dist.get_rank() * len(loss) :][: len(loss)] if loss.ndim else 1
    )
    grads = torch.autograd.grad((loss * weights).sum(), leaves)
    return [x.detach().numpy() for x in (loss, *grads, *stats)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ranks_agree_with_one_process(world_size: int, reduction: str) -> None:
    options = {"reduction": reduction, "directions": {"mean": "both", "sum": "image", "none": "text"}[reduction]}
    for kind in KINDS[: 3 if reduction == "mean" else 1]:
        inputs = clip_features(N, D, kind=kind, dtype=torch.float64, scale=SCALE)
        loss, stats = contrastive_loss(*inputs, return_stats=True, **options)
        weights = torch.linspace(1, 2, N, dtype=torch.float64) if reduction == "none" else 1
        grads = [g.numpy() for g in torch.autograd.grad((loss * weights).sum(), inputs)]
        ranks = run_on_ranks(world_size, sharded, kind, options)
        losses, d_image, d_text, d_scale, row_lse, col_lse, hits = zip(*ranks, strict=True)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)  # noqa: E731
        times = 1 if reduction == "none" else world_size  # the gradient is that of the sum over ranks
        if reduction == "none":
            close(np.concatenate(losses), loss.detach().numpy())
        else:
            assert all(close(x, loss.item()) is None for x in losses)
        close(np.concatenate(d_image), times * grads[0])
        close(np.concatenate(d_text), times * grads[1])
        close(np.sum(d_scale), times * grads[2])
        close(np.concatenate(row_lse), stats.row_lse.numpy())
        close(np.concatenate(col_lse), stats.col_lse.numpy())
        assert (np.concatenate(hits, 1) == stats.hits.numpy()).all()


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


def both_ways(local_loss: bool, gather_with_grad: bool) -> tuple[list[Any], list[Any]]:
    image, text, scale = clip_features(N, D, dtype=torch.float64, scale=SCALE)
    leaves = (own(image), own(text), scale)
    module = ClipLoss(local_loss, gather_with_grad, rank=dist.get_rank(), world_size=dist.get_world_size())
    ours = value_and_gradients(module, leaves)
    theirs = value_and_gradients(lambda *x: open_clip_formula(*x, local_loss, gather_with_grad), leaves)
    return [x.numpy() for x in ours], [x.numpy() for x in theirs]


@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("gather_with_grad", [False, True])
def test_clip_loss_gathers_as_open_clip(local_loss: bool, gather_with_grad: bool) -> None:
    ranks = run_on_ranks(2, both_ways, local_loss, gather_with_grad)
    for ours, theirs in ranks:
        for mine, other in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-14)
    ours, theirs = (np.mean([rank[way][3] for rank in ranks]) for way in (0, 1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


GATHERS = [(local_loss, gather_with_grad) for local_loss in (False, True) for gather_with_grad in (False, True)]


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
    ranks = run_on_ranks(world_size, with_open_clip)
    for kind, results in zip(GATHERS, zip(*ranks, strict=True), strict=True):
        for ours, theirs in results:
            for mine, other in zip(ours[:3], theirs[:3], strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-14, err_msg=str(kind))
        ours, theirs = (np.mean([result[way][3] for result in results]) for way in (0, 1))
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, err_msg=str(kind))


def uneven() -> str:
    image, text, scale = clip_features(3 + dist.get_rank(), D)
    try:
        contrastive_loss(image, text, scale, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "no error"


def wrong_rank() -> str:
    try:
        ClipLoss(rank=0, world_size=3)(*clip_features(3, D))
    except ValueError as error:
        return str(error)
    return "no error"


def test_mistakes_are_told_on_every_rank() -> None:
    expected = "image_features has [3, 4] rows on the ranks of the group, must have the same number on each"
    assert run_on_ranks(2, uneven) == [expected] * 2
    assert all("must be those of the group: " in message for message in run_on_ranks(2, wrong_rank))
