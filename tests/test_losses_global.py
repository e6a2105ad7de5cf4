"""The global contrastive loss against the papers' update written out in fp64, alone and on several ranks."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from contrastive_loss_helpers import run_on_ranks
from torch import Tensor

from fastclip.losses import GlobalContrastiveLoss
from fastclip.losses.normalisers import Normalisers

SAMPLES, STEPS, GAMMAS, EPS = 13, 6, (1.0, 0.7, 0.2, 0.2, 0.2, 0.2), 1e-3
IMAGES, TEXTS = {1: (6,), 2: (2, 4), 4: (1, 2, 2, 1)}, {1: (8,), 2: (4, 4), 4: (1, 3, 3, 1)}
KINDS: dict[str, dict[str, Any]] = {"unscaled": {}, "robust": {"rho": 6.5}, "ring": {"rho": 6.5, "ring": True}}


def unit(rows: int, seed: int, d: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)


def batches(n: int, m: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(image, text, index) of each step; texts from n on are nobody's."""
    orders = [torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:n] for step in range(STEPS)]
    return [(unit(n, 10 + step), unit(m, 20 + step), order) for step, order in enumerate(orders)]


def scale() -> Tensor:
    return torch.tensor(9.0, dtype=torch.float64, requires_grad=True)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def written_out(
    rho: float | None = None, ring: bool = False, n: int = 6, m: int = 8
) -> tuple[list[list[Tensor]], Tensor]:
    """[value, d image, d text, d scale] of each step with the matrix of all pairs, and u and v behind the last."""
    n, m = 6, 8
    u, found = torch.zeros(2, SAMPLES, dtype=torch.float64), []
    for (image, text, index), gamma in zip(batches(n, m), GAMMAS, strict=True):
        image, text, s = leaves(image, text, scale())
        z = s * image @ text.T
        own = z.diagonal()
        off = 1 - torch.eye(n, m, dtype=torch.float64)
        g = ((z - own[:, None]).exp() * off).sum(1) / (m - 1)
        h = ((z[:, :n] - own[None, :]).exp() * off[:, :n]).sum(0) / (n - 1)
        for side, now in enumerate((g.detach(), h.detach())):
            u[side, index] = torch.where(u[side, index] == 0, now, (1 - gamma) * u[side, index] + gamma * now)
        mean = sum((now / (EPS + u[side, index])).mean() for side, now in enumerate((g, h))) / 2
        value = (EPS + u[:, index]).log().sum() / 2 / n
        loss = mean + (value - mean).detach()
        if rho is not None:
            loss = (loss + rho) / s
        found.append([loss.detach(), *torch.autograd.grad(loss, (image, text, s))])
    return found, u


def ours(kind: str) -> tuple[list[list[Any]], np.ndarray]:
    """The same from this rank's part of each batch."""
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    images, texts = IMAGES[world_size], TEXTS[world_size]
    module = GlobalContrastiveLoss(SAMPLES, eps=EPS, group=group, **KINDS[kind]).double()
    found = []
    for (image, text, index), gamma in zip(of_ranks(images, texts), GAMMAS, strict=True):
        rows, columns = image.split(images)[rank], text.split(texts)[rank]
        inputs = leaves(rows, columns, scale())
        module.gamma = gamma
        loss = module(*inputs, index.split(images)[rank])
        found.append([x.detach().numpy() for x in (loss, *torch.autograd.grad(loss, inputs))])
    return found, module.normalisers.part().exp().numpy()


def of_ranks(images: tuple[int, ...], texts: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The batches with each rank's texts behind one another: those of its own images first."""
    n, result = sum(images), []
    spares = [b - a for a, b in zip(images, texts, strict=True)]
    for image, text, index in batches(n, sum(texts)):
        parts = zip(text[:n].split(images), text[n:].split(spares), strict=True)
        result.append((image, torch.cat([x for pair in parts for x in pair]), index))
    return result


def every_kind() -> dict[str, Any]:
    return {kind: ours(kind) for kind in KINDS}


@cache
def ranks(world_size: int) -> list[dict[str, Any]]:
    return run_on_ranks(world_size, every_kind)


@pytest.mark.parametrize("kind", ["unscaled", "robust"])
def test_the_update_and_the_estimate_of_the_papers(kind: str) -> None:
    truth, u = written_out(**KINDS[kind])
    found, part = ours(kind)
    for step, (wanted, got) in enumerate(zip(truth, found, strict=True)):
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_allclose(b, a.numpy(), rtol=1e-11, atol=1e-14, err_msg=f"step {step}")
    np.testing.assert_allclose(part, u.numpy(), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks(world_size: int, kind: str) -> None:
    """The mean over ranks of W dL/dx is the gradient of the one batch; each rank keeps every W-th sample."""
    truth, u = written_out(**KINDS[kind])
    images, texts, n = IMAGES[world_size], TEXTS[world_size], 6
    results = [result[kind] for result in ranks(world_size)]
    for step, (value, d_image, d_text, d_scale) in enumerate(truth):
        got = [found[step] for found, _ in results]
        np.testing.assert_allclose([x[0] for x in got], [value] * world_size, rtol=1e-11)
        np.testing.assert_allclose(np.concatenate([x[1] for x in got]), world_size * d_image.numpy(), rtol=1e-10)
        own = np.concatenate([x[2][:count] for x, count in zip(got, images, strict=True)])
        spare = np.concatenate([x[2][count:] for x, count in zip(got, images, strict=True)])
        together = np.concatenate((own, spare))
        np.testing.assert_allclose(together, world_size * d_text.numpy(), rtol=1e-10, atol=1e-15)
        assert len(together) == sum(texts) == n + 2
        np.testing.assert_allclose(np.mean([x[3] for x in got]), d_scale.numpy(), rtol=1e-11)
    for rank, (_, part) in enumerate(results):
        np.testing.assert_allclose(part, u[:, rank::world_size].numpy(), rtol=1e-12)


def test_it_learns_what_the_whole_data_set_would_teach() -> None:
    """In batches of 8 of 64 pairs the mean gradient is half as far from that of all pairs together as without a memory
    (0.15 and 0.37 of its length; 0.09 and 0.36 after three times as many epochs)."""
    data, s = 64, torch.tensor(20.0, dtype=torch.float64)
    shared = unit(1, 0, 16) + unit(data, 3, 16)
    image, text = (F.normalize(unit(data, seed, 16) + shared, dim=1) for seed in (1, 2))

    def gradient(gamma: float, size: int, epochs: int) -> Tensor:
        """The mean over the second half of the epochs, of length 1."""
        loss, total = GlobalContrastiveLoss(data, gamma).double(), torch.zeros_like(image)
        for epoch in range(epochs):
            order = torch.randperm(data, generator=torch.Generator().manual_seed(epoch))
            for index in order.split(size):
                rows = image[index].requires_grad_()
                (d_rows,) = torch.autograd.grad(loss(rows, text[index], s, index), rows)
                if epoch >= epochs // 2:
                    total.index_add_(0, index, d_rows)
        return total / total.norm()

    truth, remembered, forgotten = gradient(1.0, data, 1), gradient(0.05, 8, 100), gradient(1.0, 8, 100)
    far, near = ((x - truth).norm().item() for x in (forgotten, remembered))
    assert near < far / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_overflows(dtype: torch.dtype) -> None:
    """At a scale of 100 exp(z_ij - z_ii) reaches exp(200), twice what fp32 holds; its logarithm is what is kept."""
    image = unit(16, 0).to(dtype).requires_grad_()
    module, s = GlobalContrastiveLoss(16, rho=6.5), torch.tensor(100.0, requires_grad=True)
    for _ in range(2):
        loss = module(image, -image.detach(), s, torch.arange(16))
        gradients = torch.autograd.grad(loss, (image, s))
        assert all(x.isfinite().all() for x in (loss, *gradients))
    assert module.normalisers.part().max() > math.log(torch.finfo(torch.float32).max)


def test_what_is_not_finite_is_not_remembered() -> None:
    module, text = GlobalContrastiveLoss(4), unit(4, 1).float()
    image, index, s = unit(4, 0).float(), torch.arange(4), torch.tensor(5.0)
    module(image, text, s, index)
    before = module.normalisers.part().clone()
    image[2] = torch.nan
    assert module(image, text, s, index).isnan()
    assert torch.equal(module.normalisers.part(), before)


def test_of_a_sample_that_a_batch_holds_twice_the_largest_counts() -> None:
    normalisers = Normalisers(3)
    now = torch.tensor([[1.0, 4.0, 2.0], [3.0, 1.0, 2.0]])
    new = normalisers.update(torch.tensor([1, 1, 0]), now, 0.5, (3,))
    assert torch.equal(new, now)
    assert normalisers.part().tolist() == [[2.0, 4.0, -math.inf], [2.0, 3.0, -math.inf]]


@pytest.mark.parametrize("held", [1, 2, 3, 5])
def test_parts_go_on_with_another_number_of_ranks(held: int) -> None:
    whole = torch.randn(2, 11)
    normalisers = Normalisers(11)
    normalisers.load_parts([whole[:, rank::held] for rank in range(held)])
    assert torch.equal(normalisers.part(), whole)
    with pytest.raises(ValueError, match="parts hold 11 samples, must hold 12: those of the same data set"):
        Normalisers(12).load_parts([whole])
    with pytest.raises(ValueError, match=r"part has shape \(2, 11\), must have \(2, 12\)"):
        Normalisers(12).load_own(whole)


def test_the_state_dict_is_what_goes_on() -> None:
    first, second = GlobalContrastiveLoss(SAMPLES), GlobalContrastiveLoss(SAMPLES)
    inputs = [[x.float() if x.is_floating_point() else x for x in batch] for batch in batches(6, 6)]
    for image, text, index in inputs[:3]:
        first(image, text, torch.tensor(9.0), index)
    second.load_state_dict(first.state_dict())
    for image, text, index in inputs[3:]:
        assert torch.equal(*(module(image, text, torch.tensor(9.0), index) for module in (first, second)))


def test_mistakes() -> None:
    image, text, s = unit(4, 0), unit(4, 1), torch.tensor(5.0)
    module = GlobalContrastiveLoss(9)
    wrong: dict[str, tuple[Any, ...]] = {
        r"index is a tensor of shape \(3,\), must be a tensor of shape \(4,\)": (image, text, s, torch.arange(3)),
        r"index is torch.int32, must be torch.int64": (image, text, s, torch.arange(4).int()),
        r"index has values that number no sample, must be at least 0 and below": (image, text, s, torch.arange(6, 10)),
        r"text_features has 3 rows, must have at least 4": (image, text[:3], s, torch.arange(4)),
        r"logit_scale is not positive": (image, text, -s, torch.arange(4)),
        r"image_features has 1 row over all ranks, must have at least 2": (image[:1], text, s, torch.arange(1)),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            module(*arguments)
    assert (module.normalisers.part() == -math.inf).all()
    for options, message in (
        ({"samples": 0}, "samples is 0, must be at least 1"),
        ({"gamma": 0.0}, "gamma is 0.0, must be above 0 and at most 1"),
        ({"eps": 0.0}, "eps is 0.0, must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GlobalContrastiveLoss(**{"samples": 9} | options)
    assert module(image, text, s, torch.arange(4), output_dict=True).keys() == {"contrastive_loss"}
