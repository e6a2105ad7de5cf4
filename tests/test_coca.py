"""`CoCaLoss` against its two parts and against open_clip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from contrastive_loss_helpers import run_on_ranks
from peers import open_clip_module
from torch import Tensor

from fastclip.losses import ClipLoss, CoCaLoss
from fastclip.testing import clip_features

N, D, LENGTH, VOCABULARY = 8, 5, 6, 11
CASES = [
    (weights, pad_id, local_loss, gather_with_grad)
    for weights, pad_id in (((2.0, 1.0), 0), ((1.0, 0.5), 3), ((0.5, 0.0), 0))
    for local_loss in (False, True)
    for gather_with_grad in (False, True)
]


def inputs_of(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """This rank's share of (image, text, logits, labels, scale)."""
    image, text, scale = clip_features(N, D, dtype=torch.float64, scale=20.0)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(N, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (N, LENGTH), generator=generator)
    labels[:, -1] = 0
    n = N // world_size
    own = slice(rank * n, (rank + 1) * n)
    image, text, logits = (x.detach()[own].clone().requires_grad_() for x in (image, text, logits))
    return image, text, logits, labels[own], scale


def results_of(loss: Any, inputs: tuple[Tensor, ...]) -> list[Any]:
    """Both losses and the gradients of their sum for image, text, logits and scale; a missing gradient is zero."""
    leaves = [x for x in inputs if x.is_floating_point()]
    values = loss(*inputs)
    grads = torch.autograd.grad(sum(values), leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]
    return [x.detach().double().numpy() for x in (*values, *grads)]


def test_its_two_parts() -> None:
    inputs = inputs_of(0, 1)
    image, text, logits, labels, scale = inputs
    clip, caption = CoCaLoss(2.0, 0.5, pad_id=4)(*inputs)
    torch.testing.assert_close(clip, 0.5 * ClipLoss()(image, text, scale))
    kept = labels != 4
    torch.testing.assert_close(caption, 2 * F.cross_entropy(logits[kept], labels[kept]))
    both = CoCaLoss(2.0, 0.5, pad_id=4)(*inputs, output_dict=True)
    assert list(both) == ["contrastive_loss", "caption_loss"]
    assert torch.equal(both["contrastive_loss"], clip)
    assert torch.equal(both["caption_loss"], caption)


def test_without_the_contrastive_loss() -> None:
    image, text, logits, labels, scale = inputs_of(0, 1)
    clip, caption = CoCaLoss(1.0, 0.0)(image * torch.nan, text, logits, labels, scale)
    assert clip == 0
    assert caption.isfinite()


def test_bad_input() -> None:
    image, text, logits, labels, scale = inputs_of(0, 1)
    with pytest.raises(ValueError, match=r"logits has shape \(8, 6\), must be \(n, L, V\)"):
        CoCaLoss(1.0, 1.0)(image, text, logits[..., 0], labels, scale)
    with pytest.raises(ValueError, match=r"labels has shape \(8, 5\), must be \(8, 6\) as logits"):
        CoCaLoss(1.0, 1.0)(image, text, logits, labels[:, 1:], scale)
    with pytest.raises(ValueError, match="rank is 3, must be at least 0 and below world_size, which is 2"):
        CoCaLoss(1.0, 1.0, rank=3, world_size=2)


def with_open_clip(rank: int, world_size: int) -> list[tuple[list[Any], list[Any]]]:
    theirs = open_clip_module("open_clip.loss").CoCaLoss
    results = []
    for weights, pad_id, local_loss, gather_with_grad in CASES:
        arguments = (*weights, pad_id, local_loss, gather_with_grad, True, rank, world_size)
        ours, other = (results_of(module(*arguments), inputs_of(rank, world_size)) for module in (CoCaLoss, theirs))
        results.append((ours, other))
    return results


def with_open_clip_on_ranks() -> list[tuple[list[Any], list[Any]]]:
    return with_open_clip(dist.get_rank(), dist.get_world_size())


@pytest.mark.peer
@pytest.mark.parametrize("world_size", [1, 2])
def test_coca_loss_is_open_clips(world_size: int) -> None:
    open_clip_module("open_clip.loss")  # skips where open_clip is missing
    ranks = [with_open_clip(0, 1)] if world_size == 1 else run_on_ranks(world_size, with_open_clip_on_ranks)
    for case, results in zip(CASES, zip(*ranks, strict=True), strict=True):
        for ours, theirs in results:
            for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-14, err_msg=str(case))
        ours, theirs = (np.mean([result[way][-1] for result in results]) for way in (0, 1))
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14, err_msg=str(case))
