"""GradCache against autograd of the whole batch, in fp64: any chunking, shared scale, dropout, several towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastclip.grad_cache import GradCache
from fastclip.losses import contrastive_loss

BATCH = 12


class Towers(nn.Module):
    """Two small towers and a learned scale behind one forward, as an engine wraps them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5))
        self.text = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        features = (nn.functional.normalize(x, dim=-1) for x in (self.image(image), self.text(text)))
        return dict(zip(("image_features", "text_features"), features, strict=True)) | {
            "logit_scale": self.logit_scale.exp()[0]
        }


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(BATCH, n, generator=generator, dtype=torch.float64) for n in (6, 4))  # type: ignore


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]


def whole_batch(model: Towers) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = contrastive_loss(**model(*batch()))
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.fixture
def model() -> Towers:
    return Towers().double()


def assert_same(ours: list[Tensor], truth: list[Tensor]) -> None:
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 6, 12, 100])
def test_gradient_is_that_of_the_whole_batch(model: Towers, chunk_size: int) -> None:
    loss, truth = whole_batch(model)
    model.zero_grad()
    ours = GradCache({"clip": model}, contrastive_loss, chunk_size).step({"clip": batch()})
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    assert_same(gradients(model), truth)


def test_separate_towers_with_their_own_chunks_and_a_scale_in_the_loss(model: Towers) -> None:
    loss, truth = whole_batch(model)
    model.zero_grad()

    def unit(tower: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.normalize(tower(x), dim=-1)

    def loss_fn(image_features: Tensor, text_features: Tensor, factor: float) -> Tensor:
        return contrastive_loss(image_features, text_features, model.logit_scale.exp()[0]) * factor

    towers = {"image_features": unit(model.image), "text_features": unit(model.text)}
    cache = GradCache(towers, loss_fn, {"image_features": 5, "text_features": 2})
    image, text = batch()
    ours = cache.step({"image_features": image, "text_features": text}, factor=1.0)
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    assert_same(gradients(model), truth)


def test_random_numbers_are_replayed() -> None:
    """With dropout the two passes must drop alike: the gradient equals that of the chunks forwarded once in order."""
    model = Towers(dropout=0.5).double()
    torch.manual_seed(3)
    parts = [model(*chunk) for chunk in zip(*(x.split(4) for x in batch()), strict=True)]
    joined = {k: torch.cat([p[k] for p in parts]) for k in ("image_features", "text_features")}
    contrastive_loss(**joined, logit_scale=parts[0]["logit_scale"]).backward()
    truth, after = gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(3)
    GradCache({"clip": model}, contrastive_loss, 4).step({"clip": batch()})
    assert_same(gradients(model), truth)
    assert torch.equal(torch.get_rng_state(), after)


def test_one_loss_and_as_few_forwards_as_can_be(model: Towers) -> None:
    forwards, losses = [], []

    def tower(**inputs: Tensor) -> dict[str, Tensor]:
        forwards.append(torch.is_grad_enabled())
        return model(**inputs)

    def loss_fn(**outputs: Any) -> Tensor:
        losses.append(1)
        return contrastive_loss(**outputs)

    boundaries: list[bool] = []
    cache = GradCache({"clip": tower}, loss_fn, 4, boundary=boundaries.append)
    cache.step({"clip": dict(zip(("image", "text"), batch(), strict=True))})
    assert losses == [1]
    assert forwards == [False, False, True, True, True]
    assert boundaries == [False, False, True]


def test_gradients_accumulate_over_steps(model: Towers) -> None:
    _, truth = whole_batch(model)
    model.zero_grad()
    cache = GradCache({"clip": model}, contrastive_loss, 5)
    for _ in range(2):
        cache.step({"clip": batch()})
    assert_same(gradients(model), [2 * g for g in truth])


def test_loss_is_computed_in_fp32_outside_autocast(model: Towers) -> None:
    seen = []

    def loss_fn(**outputs: Tensor) -> Tensor:
        seen.extend([torch.is_autocast_enabled("cpu"), *(x.dtype for x in outputs.values())])
        return contrastive_loss(**outputs)

    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        GradCache({"clip": model}, loss_fn, 5).step({"clip": tuple(x.float() for x in batch())})
    assert seen == [False, torch.float32, torch.float32, torch.float32]


@pytest.mark.parametrize("mutation", ["drop a chunk", "double a chunk", "drop the scale"])
def test_a_broken_cache_is_seen(model: Towers, mutation: str) -> None:
    _, truth = whole_batch(model)
    model.zero_grad()
    calls = []

    def backward(surrogate: Tensor) -> None:
        calls.append(1)
        if mutation == "drop a chunk" and len(calls) == 2:
            return
        factor = 2.0 if mutation == "double a chunk" and len(calls) == 2 else 1.0
        (surrogate * factor).backward()

    cache = GradCache({"clip": model}, contrastive_loss, 5, backward=backward)
    cache.step({"clip": batch()})
    if mutation == "drop the scale":
        model.logit_scale.grad = torch.zeros_like(model.logit_scale)
    with pytest.raises(AssertionError):
        assert_same(gradients(model), truth)


def test_bad_input(model: Towers) -> None:
    with pytest.raises(ValueError, match="chunk_size of clip must be at least 1, was 0"):
        GradCache({"clip": model}, contrastive_loss, 0)
    with pytest.raises(ValueError, match="chunk_size names"):
        GradCache({"clip": model}, contrastive_loss, {"image": 3})
    cache = GradCache({"clip": model}, contrastive_loss, 3)
    with pytest.raises(ValueError, match="inputs name"):
        cache.step({"image": batch()[0]})
    with pytest.raises(ValueError, match="empty"):
        cache.step({"clip": (torch.zeros(0, 6), torch.zeros(0, 4))})
    with pytest.raises(ValueError, match="must be a tensor"):
        cache.step({"clip": "images"})
