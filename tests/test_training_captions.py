"""The caption loss in the trainer's sum: the cached gradient of the whole batch's, at every engine; whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contrastive_loss_helpers import run_on_ranks
from torch import Tensor
from training_helpers import ENGINES, errors_of_engines, losses, options, run, small_data

from fastclip.errors import UserError
from fastclip.losses import contrastive_loss
from fastclip.models import CLIP, create_model, load_checkpoint
from fastclip.training.config import TrainConfig
from fastclip.training.optim import lock_towers, parameter_groups
from fastclip.training.plan import Machine, memory, step_time
from fastclip.training.processes import Processes
from fastclip.training.start import prepare

MODEL, WEIGHT = "coca_debug", 2.0


def coca() -> CLIP:
    torch.manual_seed(0)
    return create_model(MODEL)


def whole_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, caption_losses: Tensor, caption_tokens: Tensor
) -> Tensor:
    captions = caption_losses.sum() / caption_tokens.sum()
    return contrastive_loss(image_features, text_features, logit_scale) + WEIGHT * captions


def errors(recompute: str = "none", engines: tuple[tuple[str, int], ...] = ENGINES) -> dict[str, float]:
    return errors_of_engines(coca, whole_loss, engines, model=MODEL, caption_weight=WEIGHT, recompute=recompute)


def test_the_gradient_is_that_of_the_whole_batch() -> None:
    found = run_on_ranks(2, errors, timeout=300)[0]
    assert len(found) == len(ENGINES)
    assert all(value < 1e-6 for value in found.values()), found


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_too(recompute: str) -> None:
    found = run_on_ranks(2, errors, recompute, (("torch", 0), ("deepspeed", 3)), timeout=300)[0]
    assert all(value < 1e-6 for value in found.values()), found


def test_a_run_and_its_files(tmp_path: Path) -> None:
    data, out = small_data(tmp_path / "data"), tmp_path / "run"
    asked = {"model": MODEL, "caption_weight": WEIGHT, "steps": 6, "lr": 0.01}
    done = run("python", options(data, out, engine="torch", **asked))
    assert done.returncode == 0, done.stderr
    assert losses(out)[-1] < losses(out)[0] - 1
    loaded = load_checkpoint(out)
    assert loaded.config.decoder is not None
    assert "text_decoder.cross_attn.1.attn.in_proj_weight" in loaded.model.state_dict()


def test_mistakes(processes: Processes) -> None:
    with pytest.raises(UserError, match="model ViT-B-32 has no decoder for caption_weight to train: take coca"):
        prepare(TrainConfig(caption_weight=1.0), processes)
    with pytest.raises(UserError, match="model coca_debug has a decoder, which nothing trains: give caption_weight"):
        prepare(TrainConfig(model=MODEL), processes)
    for plan in (memory, step_time):
        with pytest.raises(UserError, match="of a decoder of captions are not planned yet"):
            plan(TrainConfig(model=MODEL, caption_weight=1.0), 1, Machine())
    with pytest.raises(UserError, match="hard_negatives are texts without an image, which no caption loss can take"):
        TrainConfig(model=MODEL, caption_weight=1.0, hard_negatives=True)


def test_the_decoder_is_of_neither_tower() -> None:
    config = TrainConfig(model=MODEL, caption_weight=1.0, text_lr=1e-5, lr=1e-3)
    locked, model = coca(), coca()
    lock_towers(locked, TrainConfig(lock_image=True, lock_text=True))
    trained = {name.partition(".")[0] for name, p in locked.named_parameters() if p.requires_grad}
    assert trained == {"text_decoder", "logit_scale"}
    rates = {p: group["lr"] for group in parameter_groups(model, config) for p in group["params"]}
    assert {rates[p] for p in model.text_decoder.parameters()} == {1e-3}
    assert {rates[p] for p in model.transformer.parameters()} == {1e-5}
