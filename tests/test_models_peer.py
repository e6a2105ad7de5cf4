"""Our towers against open_clip's and transformers' with the same random weights: features, gradients, files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models_helpers import (
    BIDIRECTIONAL,
    CLIPA,
    EOS,
    RESNET,
    SIGLIP,
    VIT,
    assert_same,
    captions,
    gradients,
    hf_model,
    images,
    open_clip_model,
    perturbed,
)
from peers import open_clip_module

from fastclip.models import CLIP, CLIPConfig, create_model, load_checkpoint, save_model
from fastclip.models.layouts import from_native, to_native

pytestmark = pytest.mark.peer

CONFIGS = {
    "vit": VIT,
    "vit-quickgelu": replace(VIT, quick_gelu=True),
    "vit-avg": replace(VIT, vision=replace(VIT.vision, pool_type="avg", mlp_ratio=3.3)),
    "resnet": RESNET,
    "eos": EOS,
    "clipa": CLIPA,
    "bidirectional": BIDIRECTIONAL,
    "siglip": SIGLIP,
}


HF_CONFIGS = {
    "clip": VIT,
    "clip-quickgelu": replace(VIT, quick_gelu=True, vision=replace(VIT.vision, mlp_ratio=3.3)),
    "clip-eos": EOS,
    "siglip": SIGLIP,
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_features_and_gradients_are_open_clips(config: CLIPConfig, packed: bool) -> None:
    theirs = perturbed(open_clip_model(config))
    ours = CLIP(config, packed_text=packed)
    ours.load_state_dict(to_native(theirs.state_dict(), config))
    image, text = images(config), captions(config)
    features, expected = ours(image, text), theirs(image, text)
    assert len(features) == len(expected)
    for name, y, x in zip(("image", "text", "scale", "bias"), features, expected, strict=False):
        assert (y - x).norm() / x.norm() <= 1e-5, name
    assert_same(gradients(ours, features), to_native(gradients(theirs, expected), config), 1e-5)


@pytest.mark.parametrize("config", HF_CONFIGS.values(), ids=HF_CONFIGS)
def test_features_and_gradients_are_transformers(config: CLIPConfig) -> None:
    theirs = perturbed(hf_model(config))
    ours = CLIP(config)
    ours.load_state_dict(to_native(theirs.state_dict(), config))
    image, text = images(config), captions(config)
    out = theirs(input_ids=text, pixel_values=image)
    expected = (out.image_embeds, out.text_embeds, theirs.logit_scale.exp().squeeze())
    if config.init_logit_bias is not None:
        expected += (theirs.logit_bias.squeeze(),)
    features = ours(image, text)
    for name, y, x in zip(("image", "text", "scale", "bias"), features, expected, strict=False):
        assert (y - x).norm() / x.norm() <= 1e-5, name
    assert_same(gradients(ours, features), to_native(gradients(theirs, expected), config), 1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_state_dicts_have_the_same_names_and_shapes(config: CLIPConfig) -> None:
    theirs, ours = open_clip_model(config).state_dict(), from_native(CLIP(config).state_dict(), config)
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_initialisation_has_open_clips_spread(config: CLIPConfig) -> None:
    """Mean and standard deviation of each entry, within five times what its size lets them vary."""
    wide = replace(config, vision=replace(config.vision, width=64), text=replace(config.text, width=96))
    theirs, ours = open_clip_model(wide).state_dict(), CLIP(wide).state_dict()
    for name, value in theirs.items():
        if not value.is_floating_point():
            continue
        slack = 5 * value.std(correction=0) * value.numel() ** -0.5 + 1e-7
        for measure in (torch.mean, torch.std):
            mine, expected = (measure(x.double().flatten().repeat(2)) for x in (ours[name], value))
            assert abs(mine - expected) <= 1.5 * slack, f"{name}: {measure.__name__} {mine:.4f}, not {expected:.4f}"


def test_open_clip_reads_our_folder_and_we_read_its_checkpoint(tmp_path) -> None:
    ours = perturbed(create_model(VIT)).eval()
    save_model(tmp_path, ours, VIT)
    theirs = (
        open_clip_module().create_model(f"local-dir:{tmp_path}", pretrained=str(tmp_path / "model.safetensors")).eval()
    )
    image, text = images(VIT), captions(VIT)
    torch.testing.assert_close(theirs(image, text)[:2], ours(image, text)[:2], rtol=1e-5, atol=1e-6)

    trained = {"epoch": 3, "name": "run", "state_dict": {f"module.{n}": v for n, v in theirs.state_dict().items()}}
    torch.save(trained, tmp_path / "epoch_3.pt")
    again = load_checkpoint(tmp_path / "epoch_3.pt", model=VIT).model
    torch.testing.assert_close(again(image, text), ours(image, text))
