"""What the tests of the models share: small configs, captions, and open_clip as a peer."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from peers import open_clip_module, transformers_module
from torch import Tensor, nn

from fastclip.models import CLIPConfig, DecoderConfig, TextConfig, VisionConfig
from fastclip.models.hf_config import to_hf

TEXT = TextConfig(context_length=12, vocab_size=50, width=48, heads=3, layers=2)
VIT = CLIPConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=24, patch_size=8, layers=2, width=32, head_width=16),
    text=TEXT,
)
EOS = replace(VIT, text=replace(TEXT, pool_type="eos", eos_id=7))
CLIPA = replace(
    VIT,
    vision=replace(VIT.vision, pool_type="avg", no_ln_pre=True, final_ln_after_pool=True, ls_init_value=0.3),
    text=replace(TEXT, pool_type="last", no_causal_mask=True, ls_init_value=0.3, norm_eps=1e-6),
)
BIDIRECTIONAL = replace(VIT, text=replace(TEXT, no_causal_mask=True, proj_bias=True))  # MobileCLIP 2's
SIGLIP = CLIPConfig(
    embed_dim=32,
    vision=replace(VIT.vision, image_size=26, pool_type="map", norm_eps=1e-6, gelu_tanh=True),  # 2 pixels left over
    text=replace(
        TEXT, pool_type="last", no_causal_mask=True, proj_bias=True, norm_eps=1e-6, gelu_tanh=True, width=32, heads=2
    ),
    init_logit_scale=math.log(10),
    init_logit_bias=-10.0,
    custom_text=True,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    resize_mode="squash",
)
COCA = CLIPConfig(
    embed_dim=48,
    vision=replace(VIT.vision, attentional_pool=True, attn_pooler_queries=6, attn_pooler_heads=4),
    text=replace(TEXT, embed_cls=True),
    decoder=DecoderConfig(width=48, heads=3, layers=2),
    custom_text=True,
)
RESNET = CLIPConfig(
    embed_dim=24, vision=VisionConfig(image_size=64, layers=(1, 2, 1, 1), width=8, head_width=32), text=TEXT
)


def captions(config: CLIPConfig, lengths: tuple[int, ...] = (3, 12, 7, 1, 5)) -> Tensor:
    """Token ids that end with end-of-text, by default the largest id of the vocabulary, zeros behind it."""
    last = config.text.eos_id if config.text.pool_type == "eos" else config.text.vocab_size - 1
    ids = torch.zeros(len(lengths), config.text.context_length, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, config.text.vocab_size - 1, (length,))
        row[length - 1] = last
    return ids


def images(config: CLIPConfig, batch: int = 5) -> Tensor:
    return torch.randn(batch, 3, config.vision.image_size, config.vision.image_size)


def perturbed(model: nn.Module) -> nn.Module:
    """Every parameter moved away from zeros and ones, so that a forgotten bias or gain cannot hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def gradients(model: nn.Module, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradient of a fixed random combination of the outputs for every parameter they depend on, by name."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in outputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    used = {name: value for name, value in zip(names, found, strict=True) if value is not None}
    return {name: value.reshape(()) if name in ("logit_scale", "logit_bias") else value for name, value in used.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Same names, and every entry within `tolerance` of the other in relative norm.

    The bias of a key has no effect on a softmax: what rounding makes of its zero gradient is held against 1 % of the
    largest entry.
    """
    assert ours.keys() == theirs.keys()
    floor = 0.01 * max(value.norm() for value in theirs.values())
    for name, value in ours.items():
        error = (value - theirs[name]).norm() / theirs[name].norm().clamp(min=floor)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def open_clip_model(config: CLIPConfig) -> nn.Module:
    """open_clip's model of the same config, with random weights."""
    peer = open_clip_module("open_clip.model")
    data = config.to_dict()["model_cfg"]
    is_custom = data.pop("custom_text", False)
    if config.vision.pool_type == "map":
        data["vision_cfg"] = {"layers": 1, "width": 64, "image_size": 32}  # a stand-in: open_clip has full sizes only
    model = (peer.CustomTextCLIP if is_custom else peer.CLIP)(**data)
    if config.vision.pool_type == "map":
        model.visual = nn.Sequential(OrderedDict(trunk=timm_siglip(config), head=nn.Sequential()))
    return model


def timm_siglip(config: CLIPConfig) -> nn.Module:
    """timm's SigLIP tower of any size."""
    open_clip_module()  # what timm needs of torchvision
    from timm.models.vision_transformer import VisionTransformer

    vision = config.vision
    return VisionTransformer(
        img_size=vision.image_size, patch_size=vision.patch_size, embed_dim=vision.width, depth=vision.layers,
        num_heads=vision.width // vision.head_width, mlp_ratio=vision.mlp_ratio, class_token=False, global_pool="map",
        num_classes=0, act_layer="gelu_tanh" if vision.gelu_tanh else "gelu",
    )  # fmt: skip


def hf_model(config: CLIPConfig) -> Any:
    """The CLIPModel or SiglipModel of transformers of the same config, with random weights, in eval mode."""
    peer = transformers_module()
    data = to_hf(config)
    kind = "Siglip" if config.vision.pool_type == "map" else "CLIP"
    hf_config = getattr(peer, f"{kind}Config")(**{k: v for k, v in data.items() if k != "architectures"})
    return getattr(peer, f"{kind}Model")(hf_config).eval()
