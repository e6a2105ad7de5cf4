"""The blocks' products in fp8, by torchao: opt-in, for a GPU that multiplies it, and worth it from ViT-L on.

Each product casts its two factors on the fly, e4m3 going forward and e5m2 for the gradients, with one scale a tensor
(Micikevicius et al. 2022); parameters, sums, attention, LayerNorm, embeddings and the loss stay what they were. So do
the names and the values of the state dict.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastclip.models.clip import CLIP
from fastclip.models.transformer import blocks_of, linear

MULTIPLE = 16  # what the hardware asks of widths
LEAST_CAPABILITY = (8, 9)


def use_fp8(model: CLIP, *, device: torch.device | None = None, emulate: bool = False) -> int:
    """Has all products of the blocks of both towers computed in fp8 from now on; the number of products.

    Call it before the model is compiled or handed to an engine. Wrapped towers and ModifiedResNets have no blocks of
    ours and stay as they are.

    device: where it will run; default where it is.
    emulate: round to fp8 and multiply in the model's own dtype instead: the same numbers on any device, slower.
    Raises ImportError without torchao, ValueError where the device or a width does not allow it or nothing is there to
    convert.
    """
    _check(model, model.logit_scale.device if device is None else device, emulate)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)

    def converted(layer: nn.Linear) -> nn.Linear:
        return cast(nn.Linear, convert_to_float8_training(nn.Sequential(layer), config=config)[0])

    blocks = blocks_of(model)
    for block in blocks:
        attention, mlp = block.attn, block.mlp
        attention.product = _product(converted(nn.Linear(1, 1, device="meta")))
        attention.out_proj = converted(attention.out_proj)
        mlp.c_fc, mlp.c_proj = converted(mlp.c_fc), converted(mlp.c_proj)
    return 4 * len(blocks)


def _product(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`F.linear` as `module` computes it, with a weight and a bias that another module owns."""
    return lambda x, weight, bias: functional_call(module, {"weight": weight, "bias": bias}, (x,))


def _check(model: CLIP, device: torch.device, emulate: bool) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("fp8 needs torchao, which is not installed: pip install torchao")
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError("fp8 is for the blocks of this package's Transformers, of which this model has none")
    if any(block.attn.product is not linear for block in blocks):
        raise ValueError("this model computes in fp8 already")
    widths = {side for block in blocks for side in (*block.attn.in_proj_weight.shape, *block.mlp.c_fc.weight.shape)}
    if odd := sorted(width for width in widths if width % MULTIPLE):
        raise ValueError(f"fp8 needs widths that are multiples of {MULTIPLE}, this model has {odd}")
    is_able = emulate or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY)
    if not is_able:
        major, minor = LEAST_CAPABILITY
        raise ValueError(
            f"fp8 needs a GPU of compute capability {major}.{minor} or later, this is {device}; emulate=True computes "
            "the same numbers slowly anywhere"
        )
