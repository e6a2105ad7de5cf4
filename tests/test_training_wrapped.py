"""Towers of one's own under every engine, ZeRO-3 with its partitioned weights among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from contrastive_loss_helpers import run_on_ranks
from peers import open_clip_module, transformers_module
from torch import Tensor, nn
from torch.nn import functional as F
from training_helpers import ENGINES, MODEL, errors_of_engines

from fastclip.losses import contrastive_loss
from fastclip.models import CLIP, VisionConfig, get_config, wrap

WIDTH = 20
LINEAR = F.linear


class OwnViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        return self.mix(self.patch(image).relu().mean((2, 3)))


class OwnText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(get_config(MODEL).text.vocab_size, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.embed(ids).mean(1))


def own() -> CLIP:
    torch.manual_seed(0)
    return wrap(get_config(MODEL), visual=OwnViT(), visual_width=WIDTH, text=OwnText(), text_width=WIDTH)


def of_packages(bert: str) -> CLIP:
    """A trunk of timm and a text model of transformers."""
    open_clip_module()  # and with it timm
    transformers_module()
    base = get_config(MODEL)
    vision = VisionConfig(image_size=64, timm_model_name="vit_tiny_patch16_224", timm_pool="token")
    text = replace(base.text, hf_model_name=bert, hf_pooler_type="mean_pooler", hf_proj_type="linear")
    torch.manual_seed(0)
    return CLIP(replace(base, vision=vision, text=text, custom_text=True))


def errors(make: Callable[[], CLIP] = own, engines: Sequence[tuple[str, int]] = ENGINES) -> dict[str, float]:
    found = errors_of_engines(make, contrastive_loss, engines)
    assert F.linear is LINEAR, "an engine has left another F.linear behind"
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return run_on_ranks(2, errors, timeout=300)[0]


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
def test_the_gradient_is_that_of_the_whole_batch(found: dict[str, float], kind: str, stage: int) -> None:
    assert found[f"{kind}{stage}"] < 1e-6


@pytest.mark.peer
def test_towers_of_timm_and_transformers_under_zero_2_and_3(tmp_path: Path) -> None:
    peer, text = transformers_module(), get_config(MODEL).text
    config = peer.BertConfig(
        vocab_size=text.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=text.context_length, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    peer.BertModel(config).save_pretrained(tmp_path)
    engines = (("deepspeed", 2), ("deepspeed", 3))
    found = run_on_ranks(2, errors, partial(of_packages, str(tmp_path)), engines, timeout=300)[0]
    assert all(value < 1e-6 for value in found.values()), found
