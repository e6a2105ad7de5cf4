"""GradCache against autograd of the whole batch, in fp64: any chunking, shared scale, dropout, several towers."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastclip.grad_cache import GradCache
from fastclip.losses import DistillClipLoss, contrastive_loss, sigmoid_loss
from fastclip.models import create_model
from fastclip.ops.attention.packing import pack_text

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
    image, text = batch()
    with pytest.raises(ValueError, match=r"must have one number of samples, have \[11, 12\]"):
        cache.step({"clip": (image, text[:-1])})


class Sequences(nn.Module):
    """Mean of an embedding over each packed caption, and its first layer for plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 5)

    def forward(self, captions: Any) -> Tensor:
        rows = self.embedding(captions.tokens)
        return torch.stack([part.mean(0) for part in rows.split(captions.cu_seqlens.diff().tolist())])


def test_packed_captions_and_ready_made_chunks() -> None:
    """A packed batch is cut between captions; a list is taken as it is, so that chunks may differ in any way."""
    ids = torch.randint(1, 49, (7, 9))
    ids[torch.arange(7), torch.tensor([8, 3, 1, 5, 8, 2, 6])] = 49
    packed, model = pack_text(ids), Sequences().double()
    (model(packed) ** 3).sum().backward()
    (truth,) = gradients(model)
    seen: list[tuple[int, int]] = []

    def tower(captions: Any) -> Tensor:
        seen.append((len(captions), captions.max_seqlen))
        return model(captions)

    for inputs in (packed, {"captions": packed}, (packed,), [pack_text(part) for part in ids.split(3)]):
        model.zero_grad()
        seen.clear()
        GradCache({"text": tower}, lambda text: (text**3).sum(), 3).step({"text": inputs})
        assert_same(gradients(model), [truth])
        assert seen[:3] == [(3, 9), (3, 9), (1, 7)]


def test_three_towers_and_a_sum_of_losses() -> None:
    """Contrastive + sigmoid + distillation from stored teacher features + a loss of the third tower alone."""
    torch.manual_seed(0)
    image, text, extra = (nn.Linear(n, 5).double() for n in (6, 4, 3))
    bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))
    batches = {"image": batch()[0], "text": batch()[1], "extra": torch.randn(BATCH, 3, dtype=torch.float64)}
    teacher = {f"dist_{name}_features": torch.randn(BATCH, 7, dtype=torch.float64) for name in ("image", "text")}
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    towers = {"image": image, "text": text, "extra": extra}
    distill = DistillClipLoss()

    def loss_fn(image: Tensor, text: Tensor, extra: Tensor, **teacher: Tensor) -> Tensor:
        a, b = (nn.functional.normalize(x, dim=-1) for x in (image, text))
        _, distilled = distill(a, b, scale, **teacher, dist_logit_scale=scale.detach())
        total = contrastive_loss(a, b, scale) + 0.5 * sigmoid_loss(a, b, scale, bias) + 0.3 * distilled
        return total + 0.1 * (extra - a).square().mean()

    def all_gradients() -> list[Tensor]:
        leaves = [*(p for tower in towers.values() for p in tower.parameters()), bias, scale]
        found = [leaf.grad.clone() for leaf in leaves]  # type: ignore[union-attr]
        for leaf in leaves:
            leaf.grad = None
        return found

    loss = loss_fn(**{name: tower(batches[name]) for name, tower in towers.items()}, **teacher)
    loss.backward()
    truth = all_gradients()
    ours = GradCache(towers, loss_fn, {"image": 5, "text": 2, "extra": 12}).step(batches, **teacher)
    torch.testing.assert_close(ours, loss.detach(), rtol=1e-12, atol=0)
    assert_same(all_gradients(), truth)


def test_a_locked_tower_is_forwarded_once(model: Towers) -> None:
    model.image.requires_grad_(False)
    counts = dict.fromkeys(("image", "text"), 0)
    for name in counts:
        module = getattr(model, name)
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))

    def loss_fn(image: Tensor, text: Tensor) -> Tensor:
        a, b = (nn.functional.normalize(x, dim=-1) for x in (image, text))
        return contrastive_loss(a, b, model.logit_scale.exp()[0])

    image, text = batch()
    loss_fn(model.image(image), model.text(text)).backward()
    truth = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    counts.update(dict.fromkeys(counts, 0))
    for order in (("text", "image"), ("image", "text")):
        model.zero_grad()
        cache = GradCache({name: getattr(model, name) for name in order}, loss_fn, 4)
        cache.step({"image": image, "text": text})
        assert_same([p.grad for p in model.parameters() if p.grad is not None], truth)
    assert counts == {"image": 2 * 3, "text": 2 * 5}


def test_running_statistics_move_once_a_chunk() -> None:
    """And the gradient is that of the batch normalised chunk by chunk."""
    tower = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
    image, start = batch()[0], {k: v.clone() for k, v in tower.state_dict().items()}
    parts = [tower(part) for part in image.split(4)]
    (torch.cat(parts) ** 3).sum().backward()
    truth, count = gradients(tower), tower[1].num_batches_tracked.clone()
    mean = tower[1].running_mean.clone()
    tower.load_state_dict(start)
    tower.zero_grad()
    GradCache({"image": functools.partial(tower)}, lambda image: (image**3).sum(), 4).step({"image": image})
    assert_same(gradients(tower), truth)
    assert tower[1].num_batches_tracked == count == 3
    # The kept chunk comes first in the second pass, so the moving average weighs the chunks in another order.
    assert (tower[1].running_mean - mean).abs().max() < 0.1 * mean.abs().max()


def test_inputs_stay_where_they_are(model: Towers) -> None:
    """Chunks go to the device one at a time; the device "meta" computes nothing but shapes."""
    model.to("meta")
    seen = []

    def tower(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        seen.append((image.device.type, len(image)))
        return model(image, text)

    def loss_fn(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        return (image_features * text_features).sum() * logit_scale

    inputs = dict(zip(("image", "text"), batch(), strict=True))
    GradCache({"clip": tower}, loss_fn, 5, device="meta").step({"clip": inputs})
    assert seen == [("meta", 5), ("meta", 5), ("meta", 2), ("meta", 5), ("meta", 5)]
    assert {x.device.type for x in inputs.values()} == {"cpu"}


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages made within and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known | self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak_of_step(factor: int, chunk_size: int | None) -> int:
    """Bytes above inputs, weights and their gradient for a batch of 16 times `factor`; None forwards it whole."""
    n = 16 * factor
    model = create_model("debug")
    image, text = torch.randn(n, 3, 64, 64), torch.randint(1, 1023, (n, 32))
    clip = functools.partial(model, output_dict=True)
    GradCache({"clip": clip}, contrastive_loss, 8).step({"clip": (image[:16], text[:16])})  # makes the gradients
    with LiveBytes() as live:
        if chunk_size:
            GradCache({"clip": clip}, contrastive_loss, chunk_size).step({"clip": (image, text)})
        else:
            contrastive_loss(**clip(image, text)).backward()
    return live.peak


def test_activation_memory_does_not_grow_with_the_batch() -> None:
    """1, 4 and 16 times the batch at one chunk size: the peak grows by the cached features and their gradients alone.

    Two towers' features of 64 fp32 figures: as cached, joined, normalised gradients, and the loss's own working copies,
    512 bytes each a pair; a pair's activations are some 300 times that.
    """
    features = 2 * 64 * 4
    one, four, sixteen = (peak_of_step(factor, 16) for factor in (1, 4, 16))
    assert four - one < 48 * 8 * features
    assert sixteen - one < 240 * 8 * features
    assert sixteen < 1.25 * one
    assert peak_of_step(4, None) > 3 * one, "the measure sees no activations"
