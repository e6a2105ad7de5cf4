"""Optimizers against their formulas and other people's code; what is trained, at which rate; schedules; resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peers import peer_module
from training_helpers import MODEL, debug_model

from fastclip.errors import UserError
from fastclip.models import create_model
from fastclip.training.config import TrainConfig
from fastclip.training.optim import depths, lock_towers, parameter_groups, set_training, tower_of
from fastclip.training.optimizers import Lamb, Lion, StableAdamW
from fastclip.training.schedule import lr_factor

LR, BETAS, EPS, DECAY, STEPS = 0.03, (0.9, 0.95), 1e-6, 0.1, 12


def gradients(count: int = STEPS, size: int = 6) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    scales = 10.0 ** generator.uniform(-2, 1, count)  # of very different sizes
    return [scale * generator.standard_normal(size) for scale in scales]


def lion(p: np.ndarray) -> np.ndarray:
    m = np.zeros_like(p)
    for g in gradients():
        p = p - LR * (np.sign(BETAS[0] * m + (1 - BETAS[0]) * g) + DECAY * p)
        m = BETAS[1] * m + (1 - BETAS[1]) * g
    return p


def lamb(p: np.ndarray) -> np.ndarray:
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients(), 1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        ratio = m / (1 - BETAS[0] ** t) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
        update = ratio + DECAY * p
        p = p - LR * np.linalg.norm(p) / np.linalg.norm(update) * update
    return p


def stableadamw(p: np.ndarray) -> np.ndarray:
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients(), 1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in BETAS)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rate = LR / max(1.0, math.sqrt(np.mean(g**2 / np.maximum(v, EPS**2))))
        p = p - rate * DECAY * p - rate * m / (np.sqrt(v) + EPS)
    return p


def trajectory(make: Callable[..., torch.optim.Optimizer], **options: Any) -> np.ndarray:
    p = torch.nn.Parameter(torch.linspace(-1, 2, 6, dtype=torch.float64))
    optimizer = make([{"params": [p], "lr": LR, "betas": BETAS, "weight_decay": DECAY}], **options)
    for g in gradients():
        p.grad = torch.from_numpy(g)
        optimizer.step()
    return p.detach().numpy()


@pytest.mark.parametrize(("make", "formula"), [(Lion, lion), (Lamb, lamb), (StableAdamW, stableadamw)])
def test_a_trajectory_follows_the_paper(make: Any, formula: Any) -> None:
    start = np.linspace(-1, 2, 6)
    np.testing.assert_allclose(trajectory(make), formula(start), rtol=1e-12)
    assert np.abs(formula(start) - start).max() > 0.05


@pytest.mark.peer
@pytest.mark.parametrize(
    ("make", "name", "options"), [(Lion, "lion", {}), (Lamb, "lamb", {"max_grad_norm": None, "eps": EPS})]
)
def test_a_trajectory_is_timms(make: Any, name: str, options: dict[str, Any]) -> None:
    theirs = getattr(peer_module(f"timm.optim.{name}"), name.capitalize())
    np.testing.assert_allclose(trajectory(make), trajectory(theirs, **options), rtol=1e-6)


@pytest.mark.parametrize("make", [Lion, Lamb, StableAdamW])
def test_a_state_that_is_loaded_goes_on_bit_equal(make: Any) -> None:
    runs = []
    for resumed_at in (None, 5):
        p = torch.nn.Parameter(torch.linspace(-1, 2, 6))
        optimizer = make([p], lr=LR)
        for step, g in enumerate(gradients()):
            if step == resumed_at:
                state, optimizer = optimizer.state_dict(), make([p], lr=LR)
                optimizer.load_state_dict(state)
            p.grad = torch.from_numpy(g).float()
            optimizer.step()
        runs.append(p.detach().clone())
    assert torch.equal(*runs)


def rates(**options: Any) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) by parameter."""
    model = debug_model()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, TrainConfig(**options))
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_towers_have_their_own_rate_and_decay() -> None:
    found = rates(lr=1.0, image_lr=0.5, text_lr=0.1, image_weight_decay=0.0, text_weight_decay=0.7)
    for name, (lr, decay) in found.items():
        assert lr == pytest.approx({"image": 0.5, "text": 0.1, "": 1.0}[tower_of(name)]), name
        assert decay in ({"image": (0.0,), "text": (0.0, 0.7), "": (0.0,)}[tower_of(name)]), name
    assert found["transformer.resblocks.0.mlp.c_fc.weight"][1] == 0.7


def test_layers_decay_towards_the_input() -> None:
    """Two blocks: projection, last block, first block, embedding."""
    found = rates(lr=1.0, image_layer_decay=0.5)
    ours = {
        "visual.proj": 1.0,
        "visual.ln_post.weight": 0.5,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": 0.5,
        "visual.transformer.resblocks.0.ln_1.bias": 0.25,
        "visual.conv1.weight": 0.125,
        "visual.positional_embedding": 0.125,
        "visual.class_embedding": 0.125,
        "visual.ln_pre.bias": 0.125,
        "token_embedding.weight": 1.0,
        "logit_scale": 1.0,
    }
    assert {name: found[name][0] for name in ours} == ours
    text = rates(lr=1.0, text_layer_decay=0.5)
    assert text["token_embedding.weight"][0] == text["positional_embedding"][0] == 0.125
    assert text["ln_final.weight"][0] == text["transformer.resblocks.1.ln_2.bias"][0] == 0.5
    assert text["text_projection"][0] == text["visual.conv1.weight"][0] == 1.0


def trained(**options: Any) -> set[str]:
    model = debug_model()
    lock_towers(model, TrainConfig(**options))
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_locked_towers_and_their_last_groups() -> None:
    everything = trained()
    image, text = ({name for name in everything if tower_of(name) == tower} for tower in ("image", "text"))
    assert trained(lock_image=True) == everything - image
    assert trained(lock_image=True, lock_text=True) == {"logit_scale"}
    assert trained(lock_image=True, image_unlocked=1) - text == {"visual.proj", "logit_scale"}
    two = trained(lock_image=True, image_unlocked=2) - text
    assert "visual.ln_post.weight" in two
    assert {name for name in two if "resblocks" in name} == {name for name in image if "resblocks.1." in name}
    assert trained(lock_image=True, image_unlocked=4) == everything
    with pytest.raises(UserError, match="image_unlocked must be at most 4, the groups of the tower, was 5"):
        trained(lock_image=True, image_unlocked=5)


@pytest.mark.peer
@pytest.mark.parametrize("unlocked", range(6))
def test_the_groups_are_open_clips(unlocked: int) -> None:
    open_clip = peer_module("open_clip")
    theirs = open_clip.create_model("ViT-S-32-alt")
    theirs.lock_image_tower(unlocked)
    ours = open_clip.create_model("ViT-S-32-alt")
    lock_towers(ours, TrainConfig(lock_image=True, image_unlocked=unlocked))
    for name, parameter in theirs.visual.named_parameters():
        assert parameter.requires_grad == dict(ours.visual.named_parameters())[name].requires_grad, name


def test_the_layers_of_a_resnet() -> None:
    names = ["visual.conv1.weight", "visual.layer1.0.conv1.weight", "visual.layer4.2.bn3.bias"]
    names += ["visual.attnpool.q_proj.weight", "visual.attnpool.positional_embedding"]
    assert list(depths(names).values()) == [0, 1, 4, 5, 5]


def test_locked_batch_norm_goes_by_its_running_statistics() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3))
    model[0].requires_grad_(False)
    set_training(model, True)
    assert (model[0].training, model[1].training) == (False, True)


@pytest.mark.parametrize("optimizer", ["lamb", "stableadamw"])
def test_what_measures_whole_tensors_is_refused_their_parts(optimizer: Any) -> None:
    with pytest.raises(UserError, match=f"optimizer {optimizer} measures whole tensors"):
        TrainConfig(optimizer=optimizer, zero_stage=2)
    assert TrainConfig(optimizer=optimizer, zero_stage=0).optimizer == optimizer
    assert TrainConfig(optimizer=optimizer, engine="torch").optimizer == optimizer


def test_warm_up_stable_decay() -> None:
    factors = [lr_factor("wsd", step, 2, step / 10, cooldown=0.4) for step in range(11)]
    assert factors[:7] == [0.5, 1, 1, 1, 1, 1, 1]
    assert factors[7:] == pytest.approx([1 - math.sqrt(share) for share in (0.25, 0.5, 0.75, 1.0)])


def test_a_model_for_these_tests_has_two_blocks() -> None:
    config = create_model(MODEL).config
    assert config.vision.layers == config.text.layers == 2
