"""`SigLipLoss`, and `sigmoid_loss` on several gloo ranks, against one process and against open_clip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from contrastive_loss_helpers import run_on_ranks
from peers import open_clip_module
from sigmoid_loss_helpers import eager_sigmoid_loss, exact_sigmoid_rows, sigmoid_inputs
from torch import Tensor

from fastclip.losses import SigLipLoss, sigmoid_loss
from fastclip.testing import value_and_gradients

N, D = 12, 7
DIST_IMPLS = (None, "bidir", "shift", "reduce", "gather")
Results = list[np.ndarray[Any, Any]]


def inputs_of(kind: str = "random") -> tuple[Tensor, ...]:
    return sigmoid_inputs(N, D, kind=kind, dtype=torch.float64, scale=30.0, bias=-7.0)


def own(x: Tensor) -> Tensor:
    n = len(x) // dist.get_world_size()
    return x.detach()[dist.get_rank() * n :][:n].clone().requires_grad_()


def as_arrays(tensors: tuple[Tensor, ...]) -> Results:
    return [x.numpy() for x in tensors]


def test_siglip_loss_is_the_textbook_loss() -> None:
    inputs = inputs_of()
    expected = value_and_gradients(eager_sigmoid_loss, inputs)
    for options in ({}, {"cache_labels": True, "chunk_size": 4, "dist_impl": "gather"}):
        for ours, truth in zip(value_and_gradients(SigLipLoss(**options), inputs), expected, strict=True):
            torch.testing.assert_close(ours, truth)
    assert SigLipLoss()(*inputs, output_dict=True).keys() == {"contrastive_loss"}
    image, text, scale, _ = inputs
    torch.testing.assert_close(SigLipLoss()(image, text, scale, None), eager_sigmoid_loss(*inputs[:3], 0 * scale))


def test_scale_and_bias_of_one_element() -> None:
    image, text, scale, bias = inputs_of()
    vectors = [x.detach().reshape(1).requires_grad_() for x in (scale, bias)]
    loss = SigLipLoss()(image, text, *vectors)
    assert torch.equal(loss, SigLipLoss()(image, text, scale, bias))
    assert [x.shape for x in torch.autograd.grad(loss, vectors)] == [(1,), (1,)]


def test_siglip_loss_learns() -> None:
    image, text, *_ = sigmoid_inputs(32, 16, dtype=torch.float32)
    log_scale, bias = (torch.tensor(x, requires_grad=True) for x in (2.3, -10.0))
    optimizer = torch.optim.Adam([image, text, log_scale, bias], lr=0.05)
    losses = []
    for _ in range(80):
        loss = SigLipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), log_scale.exp(), bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rank is 2, must be at least 0 and below world_size, which is 2"):
        SigLipLoss(rank=2, world_size=2)
    with pytest.raises(ValueError, match="dist_impl is 'ring', must be None or one of bidir, shift, reduce, gather"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="world_size is 2, must be 1 before"):
        SigLipLoss(rank=0, world_size=2)(*inputs_of())


OPTIONS = [("mean", False), ("sum", True), ("none", True), ("none", False)]
IDS = torch.arange(N) % 5


def sharded() -> tuple[list[Results], str]:
    """Value and gradients of each of OPTIONS on this rank, and what is said of ranks that bring unequal numbers."""
    results = []
    for reduction, is_full in OPTIONS:
        leaves = (*(own(x) for x in inputs_of("clip")[:2]), *inputs_of()[2:])
        weights = torch.linspace(1, 2, N, dtype=torch.float64)
        options: dict[str, Any] = {"group_ids": own_ids(), "weights": own(weights).detach()} if is_full else {}
        loss = sigmoid_loss(*leaves, reduction=reduction, group=dist.group.WORLD, **options)
        upstream = own(weights).detach() if loss.ndim else 1.0
        results.append(as_arrays((loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves))))
    try:
        sigmoid_loss(*sigmoid_inputs(3 + dist.get_rank(), D, dtype=torch.float32), group=dist.group.WORLD)
    except ValueError as error:
        return results, str(error)
    return results, "no error"


def own_ids() -> Tensor:
    n = N // dist.get_world_size()
    return IDS[dist.get_rank() * n :][:n]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_ranks_agree_with_one_process(world_size: int) -> None:
    ranks = run_on_ranks(world_size, sharded)
    n, weights = N // world_size, torch.linspace(1, 2, N, dtype=torch.float64)
    for k, (reduction, is_full) in enumerate(OPTIONS):
        leaves = (*inputs_of("clip")[:2], *inputs_of()[2:])
        rows = exact_sigmoid_rows(*leaves, IDS if is_full else None) * (weights if is_full else 1)
        # the gradient is that of the sum over ranks of what they return
        total = {"mean": rows.sum() / n, "sum": rows.sum(), "none": (rows * weights).sum()}[reduction]
        grads = torch.autograd.grad(total, leaves)
        losses, d_image, d_text, d_scale, d_bias = zip(*(results[k] for results, _ in ranks), strict=True)
        per_rank = rows.detach().reshape(world_size, n)
        expected = {"mean": per_rank.mean(1), "sum": per_rank.sum(1), "none": per_rank}[reduction]
        np.testing.assert_allclose(np.stack(losses), expected.numpy(), rtol=1e-10)
        np.testing.assert_allclose(np.concatenate(d_image), grads[0].numpy(), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(np.concatenate(d_text), grads[1].numpy(), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(np.sum(d_scale), grads[2].numpy(), rtol=1e-10)
        np.testing.assert_allclose(np.sum(d_bias), grads[3].numpy(), rtol=1e-10)
    counts = [3 + rank for rank in range(world_size)]
    expected_message = f"image_features has {counts} rows on the ranks of the group, must have the same number on each"
    assert [message for _, message in ranks] == [expected_message] * world_size


def with_open_clip(rank: int, world_size: int) -> list[tuple[Results, Results]]:
    """(ours, theirs) by dist_impl: the loss and its four gradients on this rank."""
    theirs = open_clip_module("open_clip.loss").SigLipLoss
    leaves = inputs_of("clip")
    if world_size > 1:
        leaves = (*(own(x) for x in leaves[:2]), *leaves[2:])
    results = []
    for dist_impl in DIST_IMPLS:
        pair = (module(True, rank, world_size, dist_impl) for module in (SigLipLoss, theirs))
        ours, other = (as_arrays(value_and_gradients(loss, leaves)) for loss in pair)
        results.append((ours, other))
    return results


def with_open_clip_on_ranks() -> list[tuple[Results, Results]]:
    return with_open_clip(dist.get_rank(), dist.get_world_size())


@pytest.mark.peer
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_siglip_loss_is_open_clips(world_size: int) -> None:
    open_clip_module("open_clip.loss")  # skips where open_clip is missing
    ranks = [with_open_clip(0, 1)] if world_size == 1 else run_on_ranks(world_size, with_open_clip_on_ranks)
    for results in ranks:
        for dist_impl, (ours, theirs) in zip(DIST_IMPLS, results, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-14, err_msg=str(dist_impl))
