"""Recipes: complete configs that are known to work, each with its source."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fastclip.errors import UserError
from fastclip.training.config import TrainConfig


def demo() -> TrainConfig:
    """`make demo`: the embedded data set on two CPU cores in minutes. Figures in docs/demo.md."""
    return TrainConfig(
        model="demo",
        global_batch=256,
        chunk_size=64,
        steps=100_000,
        minutes=5.0,
        optimizer="muon",
        lr=1e-3,
        muon_lr=0.015,
        warmup=40,
        schedule="wsd",
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
        fit=True,
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
    """ViT-B/32 on LAION-400M as open_clip trained it (its docs/PRETRAINED.md): batch 32,768, 32 epochs; its own
    schedule and decay."""
    return replace(clip(), model="ViT-B-32", steps=404_000, schedule="open_clip", decay_embeddings=True)


def datacomp(scale: str) -> TrainConfig:
    """DataComp's fixed scales (its scale_configs.py; open_clip's defaults for the rest): the data are what varies."""
    model, batch, samples, lr, warmup, beta2 = {
        "small": ("ViT-B-32", 4096, 12_800_000, 5e-4, 500, 0.98),
        "medium": ("ViT-B-32", 4096, 128_000_000, 5e-4, 500, 0.98),
        "large": ("ViT-B-16", 8192, 1_280_000_000, 5e-4, 500, 0.98),
        "xlarge": ("ViT-L-14", 90_112, 12_800_000_000, 1e-3, 10_000, 0.95),
    }[scale]
    changed = {"model": model, "global_batch": batch, "steps": samples // batch, "lr": lr, "warmup": warmup}
    return replace(openclip_laion(), betas=(0.9, beta2), **changed)  # type: ignore[arg-type]


def siglip() -> TrainConfig:
    """SigLIP (Zhai et al. 2023, arXiv 2303.15343, section 4) on ViT-B/16: batch 32,768, lr 1e-3, decay 1e-4, beta2
    0.95, 9 billion pairs. AdamW instead of Adafactor, and the warm-up, are ours."""
    return replace(
        clip(),
        model="ViT-B-16",
        steps=9_000_000_000 // 32_768,
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=1e-4,
        warmup=10_000,
        contrastive_weight=0.0,
        sigmoid_weight=1.0,
    )


def flip() -> TrainConfig:
    """FLIP (Li et al. 2023, arXiv 2212.00794) on ViT-B/16: half of the patches left out, batch 65,536, lr 4e-6 for each
    256 pairs, beta2 0.95, 32 epochs of 400 M pairs. `flip_unmasked` goes on from it."""
    batch = 65_536
    return replace(
        clip(),
        model="ViT-B-16",
        patch_dropout=0.5,
        global_batch=batch,
        steps=32 * 400_000_000 // batch,
        lr=4e-6 * batch / 256,
        betas=(0.9, 0.95),
        warmup=51_200_000 // batch,
    )


def flip_unmasked() -> TrainConfig:
    """FLIP's tuning on whole images, 0.32 epochs at lr 4e-8 for each 256 pairs; --init is the run of `flip`."""
    batch = 32_768
    steps = int(0.32 * 400_000_000) // batch
    return replace(
        flip(), patch_dropout=0.0, global_batch=batch, steps=steps, lr=4e-8 * batch / 256, warmup=steps // 10
    )


def clipa() -> TrainConfig:
    """CLIPA's small images and short captions (its scripts/exp/gpu/vit_b16/i50_t16_pretrain.sh): 112 pixels, 16 tokens,
    batch 65,536, 6 epochs of 400 M pairs. `clipa_tune` goes on from it. Its fixed sine positions are learned here."""
    return replace(
        clip(),
        model="ViT-B-16",
        image_size=112,
        context_length=16,
        crop_scale=(0.4, 1.0),
        global_batch=65_536,
        steps=6 * 400_000_000 // 65_536,
        lr=2.048e-3,
        betas=(0.9, 0.95),
        warmup=782,
        schedule="open_clip",
        decay_embeddings=True,
    )


def clipa_tune() -> TrainConfig:
    """CLIPA's tuning at 224 pixels (i50_t16_finetune.sh): 131 M pairs, batch 8,192; --init is the run of `clipa`."""
    return replace(clipa(), image_size=224, global_batch=8192, steps=131_072_000 // 8192, lr=2.56e-5, warmup=3072)


def distill() -> TrainConfig:
    """A ViT-B/32 beside a teacher, as open_clip's `--distill-model` trains it (its DistillClipLoss): the contrastive
    loss and the cross-entropy with the teacher's similarities, of equal weight. The teacher's features lie beside the
    samples (docs/how_tos/distillation.md); --distill-scale is its scale, 100 for OpenAI's and open_clip's models."""
    return replace(openclip_laion(), distill_weight=1.0, distill_scale=100.0)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "clip": clip,
    "openclip_laion": openclip_laion,
    **{f"datacomp_{scale}": partial(datacomp, scale) for scale in ("small", "medium", "large", "xlarge")},
    "siglip": siglip,
    "flip": flip,
    "flip_unmasked": flip_unmasked,
    "clipa": clipa,
    "clipa_tune": clipa_tune,
    "distill": distill,
}


def get_recipe(name: str) -> TrainConfig:
    """The recipe called `name`; an unknown name is an error that names the nearest."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown recipe {name!r}{hint} (there are {', '.join(RECIPES)})")
    return RECIPES[name]()
