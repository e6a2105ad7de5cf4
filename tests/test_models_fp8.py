"""fp8 products by torchao: close to bf16, equal to rounding the factors by hand, the same files, and refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from models_helpers import RESNET, VIT, captions, images
from peers import peer_module
from torch import Tensor
from torch.nn import functional as F

from fastclip import contrastive_loss
from fastclip.models import CLIP, create_model
from fastclip.models.fp8 import use_fp8
from fastclip.models.transformer import linear
from fastclip.testing import relative_error

CONFIG = replace(VIT, embed_dim=32)


def torchao() -> None:
    peer_module("torchao")


def loss_of(model: CLIP, image: Tensor, text: Tensor) -> Tensor:
    image_features, text_features, scale = model(image, text)
    return contrastive_loss(image_features, text_features, scale)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To fp8 with one scale for all, and back."""
    scale = torch.finfo(dtype).max / x.abs().max().clamp(min=1e-12).double()
    return (x * scale.float()).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).to(
        x.dtype
    ) / scale.float()


@pytest.mark.peer
@pytest.mark.parametrize("layer", ["in_proj", "out_proj"])
def test_it_is_the_product_of_rounded_factors(layer: str) -> None:
    torchao()
    model = create_model(CONFIG)
    assert use_fp8(model, emulate=True) == 16
    attention = model.transformer.resblocks[0].attn
    x, width = torch.randn(48, 48, requires_grad=True), 144 if layer == "in_proj" else 48
    weight, bias = (
        attention.get_parameter(f"{layer}{'_' if layer == 'in_proj' else '.'}{name}") for name in ("weight", "bias")
    )
    out = attention.product(x, weight, bias) if layer == "in_proj" else attention.out_proj(x)
    gradient = torch.randn(48, width)
    out.backward(gradient)
    x8, w8, g8 = (
        rounded(x, torch.float8_e4m3fn),
        rounded(weight, torch.float8_e4m3fn),
        rounded(gradient, torch.float8_e5m2),
    )
    for actual, expected, unrounded in (
        (out, x8 @ w8.T + bias, x @ weight.T + bias),
        (x.grad, g8 @ w8, gradient @ weight),
        (weight.grad, g8.T @ x8, gradient.T @ x),
        (bias.grad, gradient.sum(0), None),
    ):
        assert relative_error(actual, expected) < 1e-5
        assert unrounded is None or relative_error(actual, unrounded) > 1e-2


@pytest.mark.peer
def test_gradients_are_close_and_recomputing_changes_nothing() -> None:
    torchao()
    model = create_model(CONFIG)
    fast = copy.deepcopy(model)
    use_fp8(fast, emulate=True)
    image, text = images(CONFIG, 5), captions(CONFIG)

    def gradient(model: CLIP, recompute: str = "none") -> Tensor:
        model.set_recompute(recompute)
        model.zero_grad()
        loss_of(model, image, text).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    once = gradient(fast)
    assert 0.9 < F.cosine_similarity(gradient(model), once, dim=0) < 0.9999
    assert torch.equal(gradient(fast, "selective"), once)
    assert torch.equal(gradient(fast, "full"), once)


@pytest.mark.peer
def test_it_trains_as_without() -> None:
    torchao()
    start = create_model(CONFIG)
    image, text = images(CONFIG, 16), captions(CONFIG, (3, 12, 7, 5) * 4)
    ends = []
    for fp8 in (False, True):
        model = copy.deepcopy(start)
        if fp8:
            use_fp8(model, emulate=True)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        losses = []
        for _ in range(15):
            loss = loss_of(model, image, text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ends.append(losses)
    assert ends[1][-1] < 0.5 * ends[1][0]
    assert abs(ends[1][-1] - ends[0][-1]) < 0.1 * ends[0][0]


@pytest.mark.peer
def test_the_state_dict_stays_what_it_is() -> None:
    torchao()
    model = create_model(CONFIG)
    before = copy.deepcopy(model.state_dict())
    use_fp8(model, emulate=True)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    create_model(CONFIG).load_state_dict(model.state_dict())


@pytest.mark.peer
@pytest.mark.parametrize(
    ("config", "emulate", "message"),
    [
        (CONFIG, False, "needs a GPU of compute capability 8.9"),
        (replace(CONFIG, text=replace(CONFIG.text, width=24)), True, r"multiples of 16, this model has \[24, 72\]"),
    ],
    ids=["CPU", "width"],
)
def test_what_cannot_be_is_refused(config: object, emulate: bool, message: str) -> None:
    torchao()
    model = create_model(config)
    with pytest.raises(ValueError, match=message):
        use_fp8(model, emulate=emulate)
    assert model.transformer.resblocks[0].attn.product is linear


@pytest.mark.peer
def test_twice_is_refused() -> None:
    torchao()
    model = create_model(CONFIG)
    use_fp8(model, emulate=True)
    with pytest.raises(ValueError, match="fp8 already"):
        use_fp8(model, emulate=True)


def test_without_torchao_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.models.fp8.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchao"):
        use_fp8(create_model(RESNET))
