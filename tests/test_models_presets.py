"""Every published configuration: its size to the parameter, its JSON, and open_clip's config of the same name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models_helpers import VIT
from peers import open_clip_module

from fastclip.models import CLIP, PRESETS, CLIPConfig, TextConfig, VisionConfig, get_config

# As open_clip counts them (its docs/model_profile.csv): built here on the meta device, which holds no memory.
PARAMETERS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-S-32": 63_085_825,
    "ViT-S-32-alt": 43_224_449,
    "ViT-S-16": 62_257_537,
    "ViT-S-16-alt": 42_396_161,
    "ViT-M-32": 103_119_873,
    "ViT-M-32-alt": 80_070_273,
    "ViT-M-16": 102_015_489,
    "ViT-M-16-alt": 78_978_177,
    "ViT-B-32": 151_277_313,
    "ViT-B-32-256": 151_288_833,
    "ViT-B-32-plus-256": 210_297_473,
    "ViT-B-16": 149_620_737,
    "ViT-B-16-plus": 208_351_361,
    "ViT-B-16-plus-240": 208_377_345,
    "ViT-L-16": 427_739_393,
    "ViT-L-16-320": 427_948_289,
    "ViT-L-14": 427_616_513,
    "ViT-L-14-280": 427_763_969,
    "ViT-L-14-336": 427_944_193,
    "ViT-H-16": 986_263_041,
    "ViT-H-14": 986_109_441,
    "ViT-H-14-378": 986_714_881,
    "ViT-g-14": 1_366_678_273,
    "ViT-bigG-14": 2_539_567_105,
    "ViT-e-14": 4_581_086_465,
    "coca_base": 440_337_409,
    "coca_ViT-B-32": 253_560_065,
    "coca_ViT-L-14": 638_450_177,
    "ViT-L-14-CLIPA": 414_210_561,
    "ViT-L-14-CLIPA-336": 414_538_241,
    "ViT-H-14-CLIPA": 968_235_009,
    "ViT-H-14-CLIPA-336": 968_644_609,
    "ViT-bigG-14-CLIPA": 2_517_223_937,
    "ViT-bigG-14-CLIPA-336": 2_517_756_417,
    "ViT-B-16-SigLIP": 203_155_970,
    "ViT-B-16-SigLIP-256": 203_202_050,
    "ViT-B-16-SigLIP-384": 203_447_810,
    "ViT-B-16-SigLIP-512": 203_791_874,
    "ViT-L-16-SigLIP-256": 652_150_786,
    "ViT-L-16-SigLIP-384": 652_478_466,
    "ViT-SO400M-14-SigLIP": 877_360_306,
    "ViT-SO400M-14-SigLIP-378": 877_960_498,
    "ViT-SO400M-14-SigLIP-384": 877_960_498,
    "ViT-B-16-SigLIP-i18n-256": 370_626_050,
    "ViT-B-32-SigLIP2-256": 376_856_066,
    "ViT-B-16-SigLIP2": 375_187_970,
    "ViT-B-16-SigLIP2-256": 375_234_050,
    "ViT-B-16-SigLIP2-384": 375_479_810,
    "ViT-B-16-SigLIP2-512": 375_823_874,
    "ViT-L-16-SigLIP2-256": 881_526_786,
    "ViT-L-16-SigLIP2-384": 881_854_466,
    "ViT-L-16-SigLIP2-512": 882_313_218,
    "ViT-SO400M-14-SigLIP2": 1_135_463_602,
    "ViT-SO400M-14-SigLIP2-378": 1_136_008_498,
    "ViT-SO400M-16-SigLIP2-256": 1_135_670_962,
    "ViT-SO400M-16-SigLIP2-384": 1_136_039_602,
    "ViT-SO400M-16-SigLIP2-512": 1_136_555_698,
    "ViT-gopt-16-SigLIP2-256": 1_871_393_906,
    "ViT-gopt-16-SigLIP2-384": 1_871_885_426,
}
COMMON = (  # the rows of the published table; the other models are built in the long tier
    "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-S-32", "ViT-S-16", "ViT-M-32", "ViT-M-16", "ViT-B-32",
    "ViT-B-32-256", "ViT-B-16", "ViT-B-16-plus-240", "ViT-L-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14",
    "ViT-bigG-14", "ViT-e-14", "ViT-B-16-SigLIP", "ViT-L-16-SigLIP-256", "ViT-SO400M-14-SigLIP",
)  # fmt: skip
NAMES = [pytest.param(name, marks=() if name in COMMON else pytest.mark.long) for name in PARAMETERS]
# Millions of parameters of the image and the text tower, as published
TOWERS = {
    "RN50": (38.32, 63.69),
    "RN50x64": (420.38, 202.88),
    "ViT-S-32": (22.64, 40.44),
    "ViT-B-32": (87.85, 63.43),
    "ViT-L-14-336": (304.29, 123.65),
    "ViT-H-14": (632.08, 354.03),
    "ViT-g-14": (1012.65, 354.03),
    "ViT-bigG-14": (1844.91, 694.66),
    "ViT-e-14": (3807.72, 773.37),
    "ViT-B-16-SigLIP": (92.88, 110.27),
    "ViT-L-16-SigLIP-256": (315.96, 336.19),
    "ViT-SO400M-14-SigLIP": (427.68, 449.68),
}
HEAD_DIMS = {"ViT-H-14": 80, "ViT-g-14": 88, "ViT-bigG-14": 104, "ViT-e-14": 112, "ViT-SO400M-14-SigLIP": 72}


def on_meta(name: str) -> CLIP:
    with torch.device("meta"):
        return CLIP(get_config(name))


@pytest.mark.parametrize("name", NAMES)
def test_published_models_have_their_published_size(name: str) -> None:
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {"visual.conv1.weight", "logit_scale"} <= model.state_dict().keys()
    if name in HEAD_DIMS:
        assert model.config.vision.width // model.visual.transformer.resblocks[0].attn.heads == HEAD_DIMS[name]
    if name in TOWERS:
        image = sum(p.numel() for p in model.visual.parameters())
        text = PARAMETERS[name] - image - model.logit_scale.numel()
        assert (round(image / 1e6, 2), round(text / 1e6, 2)) == TOWERS[name]


def test_every_named_model_is_counted() -> None:
    assert PARAMETERS.keys() == PRESETS.keys() - {"debug", "demo", "coca_debug"}


def test_quickgelu_is_another_activation_of_the_same_model() -> None:
    plain, quick = CLIP(get_config("debug")), CLIP(get_config("debug-quickgelu"))
    assert plain.state_dict().keys() == quick.state_dict().keys()
    x = torch.linspace(-3, 3, 7)
    for tower in (lambda model: model.transformer, lambda model: model.visual.transformer):
        torch.testing.assert_close(tower(plain).resblocks[0].mlp.gelu(x), torch.nn.functional.gelu(x))
        torch.testing.assert_close(tower(quick).resblocks[0].mlp.gelu(x), x * torch.sigmoid(1.702 * x))


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_their_json(name: str) -> None:
    config = get_config(name)
    written = json.loads(json.dumps(config.to_dict()))
    assert CLIPConfig.from_dict(written) == config
    assert get_config(f"{name}-quickgelu") == replace(config, quick_gelu=True)
    model_cfg = CLIPConfig.from_dict(written["model_cfg"])
    assert (model_cfg.vision, model_cfg.text) == (config.vision, config.text)


def test_siglip_is_written_in_timms_terms_and_other_sizes_in_ours() -> None:
    config = get_config("ViT-B-16-SigLIP")
    assert config.to_dict()["model_cfg"]["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_224"
    assert config.to_dict()["preprocess_cfg"]["resize_mode"] == "squash"
    larger = replace(config, vision=replace(config.vision, image_size=240))  # timm has no name for it
    assert larger.to_dict()["model_cfg"]["vision_cfg"]["pool_type"] == "map"
    assert CLIPConfig.from_dict(larger.to_dict()) == larger


def test_options_are_written_only_when_used() -> None:
    assert VIT.to_dict()["model_cfg"]["vision_cfg"].keys() == {
        "image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "pool_type",
    }  # fmt: skip
    vision = replace(VIT.vision, conv_stem=(8, 16), norm_eps=1e-6, gelu_tanh=True, ls_init_value=1e-4, no_ln_pre=True)
    other = replace(VIT, vision=vision, image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25))
    written = other.to_dict()["model_cfg"]["vision_cfg"]
    assert (written["conv_stem"], written["norm_kwargs"], written["act_kwargs"]) == (
        [8, 16], {"eps": 1e-6}, {"approximate": "tanh"},
    )  # fmt: skip
    assert CLIPConfig.from_dict(other.to_dict()) == other


def test_open_clips_neutral_options_are_read_and_others_refused() -> None:
    data = {"vision_cfg": {"image_size": [24, 24], "patch_size": 8, "qk_norm": False, "timm_proj": None}}
    vision = CLIPConfig.from_dict(data).vision
    assert (vision.image_size, vision.timm_proj) == (24, "")
    assert CLIPConfig.from_dict({"vision_cfg": {"layers": [1, 1, 1, 1], "patch_size": None}}).vision.patch_size == 16
    with pytest.raises(ValueError, match=r"qk_norm in vision_cfg must be False \(nothing else is supported\)"):
        CLIPConfig.from_dict({"vision_cfg": {"qk_norm": True}})
    with pytest.raises(ValueError, match="norm_kwargs in text_cfg must be"):
        CLIPConfig.from_dict({"text_cfg": {"norm_kwargs": {"elementwise_affine": False}}})
    with pytest.raises(ValueError, match="image_size in vision_cfg must be a square"):
        CLIPConfig.from_dict({"vision_cfg": {"image_size": [24, 32]}})


def test_why_text_cannot_be_packed() -> None:
    assert TextConfig().why_not_packed is None
    assert TextConfig(pool_type="eos").why_not_packed is None
    assert "no_causal_mask" in str(TextConfig(no_causal_mask=True).why_not_packed)
    assert '"last"' in str(TextConfig(pool_type="last").why_not_packed)
    assert "wrapped" in str(TextConfig(hf_model_name="roberta-base").why_not_packed)


def test_the_border_that_patches_leave_is_siglips_alone() -> None:
    assert VisionConfig(image_size=384, patch_size=14, pool_type="map").grid == 27
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        VisionConfig(image_size=384, patch_size=14)
    with pytest.raises(ValueError, match="image_size must be at least patch_size"):
        VisionConfig(image_size=8, patch_size=16, pool_type="map")
    with pytest.raises(ValueError, match='embed_dim must be the width of a "map" tower'):
        replace(get_config("ViT-B-16-SigLIP"), embed_dim=512)


@pytest.mark.peer
def test_open_clips_configs_are_ours() -> None:
    """Every model config in open_clip's package that ours has, quickgelu variants too, read from its JSON."""
    folder = Path(open_clip_module().__file__).parent / "model_configs"
    seen = 0
    for file in folder.glob("*.json"):
        base = file.stem.removesuffix("-quickgelu")
        if base in PRESETS:
            read = CLIPConfig.from_dict(json.loads(file.read_text()))
            ours = get_config(file.stem)
            assert replace(read, init_logit_scale=ours.init_logit_scale) == ours, file.stem
            seen += 1
    assert seen == 76
