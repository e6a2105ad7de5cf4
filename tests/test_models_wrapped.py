"""Towers of other packages in the same `CLIP`: options, features, training under GradCache, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models_helpers import TEXT, VIT, assert_same, captions, gradients, images
from peers import open_clip_module, transformers_module
from torch import Tensor, nn

from fastclip.grad_cache import GradCache
from fastclip.losses import ClipLoss
from fastclip.models import CLIP, CLIPConfig, TextConfig, VisionConfig, load_checkpoint, load_weights, save_model, wrap
from fastclip.ops.attention import pack_text


class OwnViT(nn.Module):
    """Any module with a width will do."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=8)

    def forward(self, image: Tensor) -> Tensor:
        return self.patch(image).relu().mean((2, 3))


class OwnText(nn.Module):
    def __init__(self, width: int = 28) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(TEXT.vocab_size, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


def steps(model: CLIP, config: CLIPConfig, chunk: int) -> dict[str, Tensor]:
    """Gradients of a step under GradCache."""
    torch.manual_seed(4)
    image, text = images(config, 6), captions(config, (3, 12, 7, 1, 5, 4))
    model.zero_grad()
    cache = GradCache({"clip": lambda i, t: model(i, t, output_dict=True)}, ClipLoss(), chunk_size=chunk)
    cache.step({"clip": (image, text)})
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("which", ["visual", "text", "both"])
def test_any_module_is_a_tower_trains_and_is_saved(tmp_path: Path, which: str) -> None:
    own = {}
    if which != "text":
        own |= {"visual": OwnViT(), "visual_width": 20}
    if which != "visual":
        own |= {"text": OwnText(), "text_width": 28}
    model = wrap(VIT, **own)
    image_features, text_features, _ = model(images(VIT), captions(VIT))
    assert image_features.shape == text_features.shape == (5, 24)
    assert_same(steps(model, VIT, 2), steps(model, VIT, 6), 1e-5)
    assert all(grad.abs().sum() > 0 for grad in steps(model, VIT, 2).values())

    save_model(tmp_path, model, model.config)
    with pytest.raises(
        ValueError, match=r"the module .*Own\w+, which only its code can build: .*fastclip\.models\.wrap"
    ):
        load_checkpoint(tmp_path)
    fresh = {name: type(value)() if isinstance(value, nn.Module) else value for name, value in own.items()}
    again = load_weights(wrap(VIT, **fresh), tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_what_an_own_module_must_return() -> None:
    with pytest.raises(ValueError, match="visual_width must be the channels that the module returns, was None"):
        wrap(VIT, visual=OwnViT())
    with pytest.raises(ValueError, match=r"OwnViT must return \(5, 21\), returned \(5, 20\)"):
        wrap(VIT, visual=OwnViT(), visual_width=21)(images(VIT))
    with pytest.raises(ValueError, match="was packed: the text tower is a wrapped model"):
        wrap(VIT, text=OwnText(), text_width=28).encode_text(pack_text(captions(VIT)))
    with pytest.raises(ValueError, match="mode must not be full: WrappedTower cannot recompute"):
        wrap(VIT, visual=OwnViT(), visual_width=20).set_recompute("full")


TIMM = {  # open_clip's ways to put a projection behind a timm model
    "linear": {"timm_pool": "avg", "timm_proj": "linear"},
    "mlp": {"timm_pool": "avg", "timm_proj": "mlp", "timm_proj_bias": True},
    "classifier": {"timm_pool": "avg", "timm_proj": ""},
    "attention": {"timm_pool": "rot_attn", "timm_proj": ""},
}


@pytest.mark.peer
@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_a_timm_tower_is_open_clips(tmp_path: Path, options: dict) -> None:
    peer = open_clip_module("open_clip.model")
    vision = VisionConfig(image_size=64, timm_model_name="resnet10t", **options)
    config = CLIPConfig(embed_dim=24, vision=vision, text=TEXT)
    data = config.to_dict()["model_cfg"]
    if not data["vision_cfg"].get("timm_proj", "linear"):
        data["vision_cfg"]["timm_proj"] = None  # open_clip's JSON has null
    theirs = peer.CLIP(**data).eval()
    ours = CLIP(config).eval()
    ours.load_state_dict(theirs.state_dict())
    image, text = images(config, 3), captions(config)
    features, expected = ours(image, text), theirs(image, text)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert_same(gradients(ours, features), gradients(theirs, expected), 1e-4)
    save_model(tmp_path, ours, config)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded.model(image)[0], features[0])


@pytest.mark.peer
def test_a_timm_tower_trains_under_grad_cache_and_open_clip_reads_it(tmp_path: Path) -> None:
    open_clip_module()
    vision = VisionConfig(image_size=64, timm_model_name="vit_tiny_patch16_224", timm_pool="token")
    config = CLIPConfig(embed_dim=24, vision=vision, text=TEXT)
    model = CLIP(config).eval()
    assert_same(steps(model, config, 2), steps(model, config, 6), 1e-4)
    model.set_recompute("full")
    assert_same(steps(model, config, 2), steps(model, config, 6), 1e-4)
    with pytest.raises(ValueError, match="timm has no model 'no_such_model'"):
        CLIP(replace(config, vision=replace(vision, timm_model_name="no_such_model")))


POOLERS = ("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler")


@pytest.mark.peer
@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("proj", ["linear", "mlp"])
def test_a_text_model_of_transformers_is_a_tower(tmp_path: Path, pooler: str, proj: str) -> None:
    peer = transformers_module()
    hf = peer.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    peer.BertModel(hf).save_pretrained(tmp_path / "bert")
    text = TextConfig(
        context_length=12, vocab_size=50, hf_model_name=str(tmp_path / "bert"), hf_pooler_type=pooler, hf_proj_type=proj
    )
    config = replace(VIT, text=text, custom_text=True)
    model = CLIP(config)
    ids = captions(config)
    features = model.encode_text(ids)
    assert features.shape == (5, 24)
    behind = ids.clone()
    assert torch.equal(model.encode_text(behind), features)  # padding is masked: zeros are Bert's padding
    if pooler != "max_pooler":  # open_clip's max pooler masks the tokens instead of the padding
        theirs = open_clip_module("open_clip.model").CustomTextCLIP(**{
            key: value for key, value in config.to_dict()["model_cfg"].items() if key != "custom_text"
        })  # fmt: skip
        theirs.load_state_dict(model.state_dict())
        torch.testing.assert_close(theirs.eval().encode_text(ids), model.eval().encode_text(ids), rtol=1e-5, atol=1e-5)
    save_model(tmp_path / "saved", model, config)
    loaded = load_checkpoint(tmp_path / "saved")
    assert torch.equal(loaded.model.encode_text(ids), model.eval().encode_text(ids))
    assert_same(steps(model, config, 2), steps(model, config, 6), 1e-4)


@pytest.mark.peer
def test_a_text_model_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers_module()
    text = TextConfig(hf_model_name=str(tmp_path / "nowhere"))
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        CLIP(replace(VIT, text=text))
    with pytest.raises(ValueError, match="hf_pooler_type must be one of"):
        CLIP(replace(VIT, text=replace(text, hf_pooler_type="sum")))
