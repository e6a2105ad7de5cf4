"""What backward keeps, and other layouts: recomputation, channels last, full graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models_helpers import CLIPA, RESNET, SIGLIP, VIT, assert_same, captions, gradients, images, perturbed
from torch import nn

from fastclip.grad_cache import GradCache
from fastclip.models import CLIP, CLIPConfig
from fastclip.ops.attention import pack_text

CONFIGS = {"vit": VIT, "quickgelu": replace(VIT, quick_gelu=True), "clipa": CLIPA, "siglip": SIGLIP, "resnet": RESNET}


def kept_bytes(model: CLIP, config: CLIPConfig) -> int:
    """Bytes of what autograd keeps for backward, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(images(config), captions(config))
    total = sum(x.untyped_storage().nbytes() for x in kept.values())
    del out
    return total


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputing_changes_no_gradient_and_no_statistic(name: str, mode: str) -> None:
    config = CONFIGS[name]
    model = perturbed(CLIP(config).double()).train()
    again = CLIP(config).double().train()
    again.load_state_dict(model.state_dict())
    again.set_recompute(mode)
    image, text = images(config).double(), captions(config)
    torch.testing.assert_close(again(image, text), model(image, text), rtol=1e-12, atol=1e-12)
    first, second = gradients(again, again(image, text)), gradients(model, model(image, text))
    assert_same(first, second, 1e-10)
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-12, atol=1e-12)


def deep(config: CLIPConfig) -> CLIPConfig:
    return replace(config, vision=replace(config.vision, layers=4), text=replace(config.text, layers=4))


def test_recomputing_keeps_less() -> None:
    config = deep(VIT)
    model = CLIP(config).train()
    kept = {}
    for mode in ("none", "selective", "full"):
        model.set_recompute(mode)
        kept[mode] = kept_bytes(model, config)
    assert kept["selective"] < 0.75 * kept["none"]
    assert kept["full"] < 0.35 * kept["none"]
    model.set_grad_checkpointing(False)
    assert kept_bytes(model, config) == kept["none"]


def test_products_are_not_run_again_by_selective_recomputation() -> None:
    """LayerNorm, activation and attention may come again, products with a weight do not."""
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for mode in ("none", "selective", "full"):
        model = CLIP(deep(VIT)).train()
        model.set_recompute(mode)
        counter = FlopCounterMode(display=False)
        with counter:
            out = model(images(VIT), captions(VIT))
            (out[0].sum() + out[1].sum()).backward()
        flops[mode] = counter.get_total_flops()
    assert flops["selective"] < 1.05 * flops["none"]
    assert flops["full"] > 1.2 * flops["none"]


def test_resnets_keep_less_too() -> None:
    model = CLIP(RESNET).train()
    whole = kept_bytes(model, RESNET)
    model.set_recompute("full")
    assert kept_bytes(model, RESNET) < 0.7 * whole
    model.eval()
    out = model(images(RESNET))[0]
    assert out.requires_grad


def test_recomputing_under_grad_cache_with_patch_dropout() -> None:
    config = replace(VIT, vision=replace(VIT.vision, patch_dropout=0.5))
    found = []
    for mode in ("none", "full", "selective"):
        torch.manual_seed(1)
        model = CLIP(config).double().train()
        model.set_recompute(mode)
        torch.manual_seed(2)
        image, text = images(config, 6).double(), captions(config, (3, 12, 7, 1, 5, 4))
        cache = GradCache(
            {"clip": lambda i, t, m=model: m(i, t, output_dict=True)},
            lambda image_features, text_features, logit_scale: nn.functional.cross_entropy(
                logit_scale * image_features @ text_features.T, torch.arange(6)
            ),
            chunk_size=2,
        )
        torch.manual_seed(3)
        cache.step({"clip": (image, text)})
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(found[1], found[0], 1e-6)  # the surrogates are fp32
    assert_same(found[2], found[0], 1e-6)


def test_a_mode_that_is_none() -> None:
    with pytest.raises(ValueError, match='mode must be "none", "selective" or "full", was \'half\''):
        CLIP(VIT).set_recompute("half")


@pytest.mark.parametrize("name", ["vit", "resnet", "siglip"])
def test_channels_last_is_the_same(name: str) -> None:
    config = CONFIGS[name]
    model = perturbed(CLIP(config).double())
    image, text = images(config).double(), captions(config)
    expected = gradients(model, model(image, text))
    model = model.to(memory_format=torch.channels_last)
    strided = image.contiguous(memory_format=torch.channels_last)
    out = model(strided, text)
    if name == "resnet":
        stem = model.visual.bn1(model.visual.conv1(strided))
        assert stem.is_contiguous(memory_format=torch.channels_last)
    assert_same(gradients(model, out), expected, 1e-9)


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit", "resnet", "siglip"])
def test_both_towers_compile_into_full_graphs_by_inductor(name: str) -> None:
    config = CONFIGS[name]
    model = CLIP(config)
    text = captions(config)
    text = text if config.text.why_not_packed else pack_text(text)
    image = images(config)
    encode_image = torch.compile(model.encode_image, fullgraph=True)
    encode_text = torch.compile(model.encode_text, fullgraph=True)
    outputs = (encode_image(image, normalize=True), encode_text(text, normalize=True))
    expected = model(image, text)[:2]
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model, outputs), gradients(model, expected), 1e-4)
