"""What a block keeps for backward, beside open_clip's block: bytes of its saved tensors, parameters excluded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peers import open_clip_module
from torch import Tensor, nn

from fastclip.models.transformer import Transformer

WIDTH, HEADS = 96, 6


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Of every storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}
    tensors = []  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        tensors.append(tensor)
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


def block(act: str, dtype: torch.dtype, mode: str) -> nn.Module:
    transformer = Transformer(WIDTH, 1, HEADS, 4.0, act=act).to(dtype).train()
    transformer.set_recompute(mode)
    return transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu"])
def test_a_block_keeps_nine_times_its_input(act: str, dtype: torch.dtype) -> None:
    """Both sums, QKV and the pre-activation four times as wide; 16 where nothing is recomputed."""
    x = torch.randn(4, 50, WIDTH, dtype=dtype, requires_grad=True)
    unit = x.numel() * x.element_size()
    # the norm's two numbers a row come on top, and for "selective" are made again
    assert 9 * unit <= saved_bytes(block(act, dtype, "selective"), x) < 9.1 * unit
    assert 16 * unit <= saved_bytes(block(act, dtype, "none"), x) < 16.2 * unit


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("act", "most"), [("gelu", 0.60), ("quick_gelu", 0.50)])
def test_a_block_keeps_less_than_open_clips(act: str, most: float, dtype: torch.dtype) -> None:
    transformer = open_clip_module("open_clip.transformer")
    layers: dict[str, Callable[..., nn.Module]] = {"gelu": nn.GELU, "quick_gelu": transformer.QuickGELU}
    theirs = transformer.ResidualAttentionBlock(WIDTH, HEADS, act_layer=layers[act]).to(dtype).train()
    x = torch.randn(4, 50, WIDTH, dtype=dtype, requires_grad=True)
    assert saved_bytes(block(act, dtype, "selective"), x) <= most * saved_bytes(theirs, x)
