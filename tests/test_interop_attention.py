"""Our attention in timm's ViTs and in `nn.MultiheadAttention`, beside theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_helpers import perturbed
from peers import peer_module
from torch import Tensor, nn

from fastclip.errors import UserError
from fastclip.interop import attention, fast_attention
from fastclip.testing import relative_error


def values_and_gradients(model: nn.Module, *inputs: Tensor, **options: Any) -> list[Tensor]:
    model.zero_grad()
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    found = model(*inputs, **options)
    out = found[0] if isinstance(found, tuple) else found
    generator = torch.Generator().manual_seed(2)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out.detach(), inputs[0].grad, *(x.grad for x in model.parameters() if x.grad is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    floor = 0.01 * max(x.norm() for x in expected)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm().clamp(min=floor)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of our attention."""
    calls: list[Any] = []
    ours = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *args, **kwargs: calls.append(kwargs) or ours(*args, **kwargs))
    return calls


@pytest.mark.peer
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "deit3_small_patch16_224"])
def test_timms_vits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3, "num_classes": 5}
    model = perturbed(peer_module("timm").create_model(name, **small))
    x = torch.randn(2, 3, 32, 32)
    expected = values_and_gradients(model, x)
    with fast_attention(model):
        assert_same(values_and_gradients(model, x), expected)
        assert len(calls) == 3
    assert all(map(torch.equal, values_and_gradients(model, x), expected))


@pytest.mark.peer
def test_what_timm_can_do_that_we_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    make = peer_module("timm.layers").Attention
    x = torch.randn(2, 5, 16)
    causal = torch.full((5, 5), -torch.inf).triu_(1)
    plain = perturbed(make(16, 2, qkv_bias=True))
    with fast_attention(plain):
        with_mask = plain(x, attn_mask=causal)
        assert calls == []
        assert relative_error(plain(x, is_causal=True), with_mask) < 1e-5
        assert len(calls) == 1
    dropping = make(16, 2, attn_drop=0.5)
    with fast_attention(dropping):
        dropping(x)
        assert len(calls) == 1
        dropping.eval()(x)
        assert len(calls) == 2
    gated = perturbed(make(16, 2, gated=True, scale_norm=True, norm_layer=nn.LayerNorm))
    expected = values_and_gradients(gated, x)
    with fast_attention(gated):
        assert_same(values_and_gradients(gated, x), expected)
    with pytest.raises(UserError, match="no self-attention"):
        fast_attention(make(16, 2, qk_norm=True, norm_layer=nn.LayerNorm)).enable()


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_multihead_attention(batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    module = perturbed(nn.MultiheadAttention(16, 2, batch_first=batch_first))
    x = torch.randn(3, 5, 16)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = module

        def forward(self, x: Tensor, **options: Any) -> Any:
            return self.attn(x, x, x, **options)

    block = Block()
    expected = values_and_gradients(block, x, need_weights=False)
    mask = torch.ones(5 if batch_first else 3, 5 if batch_first else 3, dtype=torch.bool).triu(1)
    others: tuple[dict[str, Any], ...] = ({}, {"need_weights": False, "attn_mask": mask})
    theirs = [values_and_gradients(block, x, **options) for options in others]
    with fast_attention(block):
        assert_same(values_and_gradients(block, x, need_weights=False), expected)
        assert len(calls) == 1
        assert module(query=x, key=x, value=x, need_weights=False)[1] is None
        assert len(calls) == 2
        for options, result in zip(others, theirs, strict=True):  # weights asked for; a mask
            assert all(map(torch.equal, values_and_gradients(block, x, **options), result))
        assert torch.equal(
            module(x, x + 1, x, need_weights=False)[0],
            nn.MultiheadAttention.forward(module, x, x + 1, x, need_weights=False)[0],
        )
        assert len(calls) == 2
    with pytest.raises(UserError, match="no self-attention"):
        fast_attention(nn.MultiheadAttention(16, 2, kdim=8)).enable()


def test_an_implementation_by_name() -> None:
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 4, 16)
    with fast_attention(module, impl="fastest"), pytest.raises(ValueError, match="attention: impl is 'fastest'"):
        module(x, x, x, need_weights=False)


def test_other_codes_replacement_is_not_overwritten() -> None:
    module = nn.MultiheadAttention(16, 2)
    module.forward = lambda *args: None
    with pytest.raises(UserError, match="other code has replaced forward of a MultiheadAttention"):
        fast_attention(module).enable()
