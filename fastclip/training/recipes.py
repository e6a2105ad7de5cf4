"""Recipes: complete configs that are known to work, each with its source."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from fastclip.errors import UserError
from fastclip.training.config import TrainConfig


def demo() -> TrainConfig:
    """`make demo`: the embedded data set on two CPU cores in minutes. Figures in docs/demo.md."""
    return TrainConfig(
        model="demo",
        global_batch=512,
        chunk_size=128,
        steps=100_000,
        minutes=5.0,
        optimizer="muon",
        lr=1e-3,
        muon_lr=0.02,
        warmup=40,
        hard_negatives=True,
        zero_stage=2,
        log_every=5,
        eval_every=150,
    )


def clip() -> TrainConfig:
    """ViT-B/32 as in Radford et al. 2021 (arXiv 2103.00020, tables 18, 19): batch 32,768, 32 epochs of 400 M pairs."""
    return TrainConfig(
        model="ViT-B-32-quickgelu",
        global_batch=32_768,
        chunk_size=1024,
        steps=390_625,
        lr=5e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.2,
        warmup=2000,
        workers=8,
        log_every=10,
        save_every=1000,
    )


def openclip_laion() -> TrainConfig:
    """ViT-B/32 on LAION-400M as open_clip trained it (its docs/PRETRAINED.md): batch 32,768, 32 epochs."""
    return replace(clip(), model="ViT-B-32", steps=404_000)


RECIPES: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "clip": clip, "openclip_laion": openclip_laion}


def get_recipe(name: str) -> TrainConfig:
    """The recipe called `name`; an unknown name is an error that names the nearest."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown recipe {name!r}{hint} (there are {', '.join(RECIPES)})")
    return RECIPES[name]()
