"""Every held-out set of a folder, evaluated: what `fastclip eval`, a training run and the report share."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastclip.data import EvalSet, Tokenizer
from fastclip.errors import UserError
from fastclip.evaluation.clip_suite import clip_suite
from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.gallery import Gallery
from fastclip.evaluation.retrieval import retrieval
from fastclip.evaluation.sets import HELD_OUT, HeldOut, find_sets
from fastclip.evaluation.zero_shot import multi_label, zero_shot, zero_shot_classifier


def has_eval_sets(folder: str | Path) -> bool:
    """Whether `folder` holds `<name>_test-*.tar` shards."""
    return any(Path(folder).glob(f"*{HELD_OUT}-*.tar"))


def has_suite() -> bool:
    """Whether the packages are there that `clip_suite` needs: pip install 'fastclip-kernels[eval]'."""
    return all(find_spec(package) for package in ("sklearn", "scipy"))


def eval_sets(folder: str | Path, tokenizer: Tokenizer, image_size: int) -> dict[str, EvalSet]:
    """The sets of `folder` that lie in shards, by name, to search through."""
    found = find_sets(folder, tokenizer, image_size)
    sets = {name: one.images for name, one in found.items() if isinstance(one.images, EvalSet)}
    if not sets:
        raise UserError(f"no held-out data in {folder}: it must hold shards named <name>{HELD_OUT}-00000.tar")
    return sets


def evaluate_folder(
    encoder: Encoder, folder: str | Path, with_gallery: bool = False, split: str = "test", with_suite: bool = False
) -> dict[str, Any]:
    """{"data": folder, "sets": {name: figures}}, and "gallery" and "suite" when asked for; the same on every rank.

    See `sets` for the layouts that a folder may have, and `clip_suite` for the figures of "suite"; `split` is the one
    to evaluate where there are several.
    """
    found = find_sets(folder, encoder.tokenizer, encoder.config.vision.image_size, split)
    gallery = Gallery() if with_gallery else None
    sets, suite = {}, {}
    for name, held_out in found.items():
        sets[name], images, texts = evaluate_set(encoder, held_out, gallery)
        if with_suite:
            suite[name] = clip_suite(encoder, folder, held_out, images, texts)
    results: dict[str, Any] = {"data": str(folder), "sets": sets}
    if gallery:
        results["gallery"] = gallery.to_dict()
    return results | {"suite": suite} if with_suite else results


def evaluate_set(
    encoder: Encoder, held_out: HeldOut, gallery: Gallery | None = None
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The figures of a set, its image features, and the classifier or its captions' features."""
    images = encoder.images(held_out.images)
    figures: dict[str, Any] = {"task": held_out.task, "images": len(images), "layout": held_out.layout}
    figures["fingerprint"] = fingerprint(held_out)
    try:
        if held_out.labels is not None and held_out.task != "retrieval":
            texts = zero_shot_classifier(encoder.texts, held_out.classnames, held_out.templates)
            measure = multi_label if held_out.task == "multi_label" else zero_shot
            figures |= measure(images, texts, held_out.labels)
            figures |= {"classnames": held_out.classnames, "templates": held_out.templates}
            if gallery:
                gallery.add_classes(held_out, images, texts)
        else:
            texts = encoder.texts(held_out.captions)
            figures |= {"texts": len(texts)} | retrieval(images, texts, held_out.caption_image, encoder.group)
            if gallery:
                gallery.add_pairs(held_out, images, texts)
    except ValueError as error:
        raise UserError(f"{held_out.name} ({len(held_out.classnames)} class names): {error}") from error
    return figures | {"skipped": _total(held_out.images.skipped, encoder.group)}, images, texts


def fingerprint(held_out: HeldOut) -> str:
    """SHA-256 over the set's keys, labels, classes, prompts and captions, in their order: two sets alike in these."""
    digest = hashlib.sha256()
    labels = [] if held_out.labels is None else held_out.labels.int().tolist()
    templates = held_out.templates if isinstance(held_out.templates, dict) else list(held_out.templates)
    parts: Iterable[Any] = (held_out.images.keys, labels, held_out.classnames, templates, held_out.captions)
    for part in (*parts, held_out.caption_image.tolist()):
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def summary(results: dict[str, Any]) -> str:
    """The figures in one line."""
    parts = []
    for name, figures in results["sets"].items():
        if figures["task"] == "zero_shot":
            parts.append(f"{name} top-1 {figures['top1']:.1%}")
        elif figures["task"] == "multi_label":
            parts.append(f"{name} mAP {figures['mean_average_precision']:.1%}")
        else:
            ways = (("image->text", "image_to_text"), ("text->image", "text_to_image"))
            shown = (f"{way} R@1 {figures[key]['R@1']:.1%} R@5 {figures[key]['R@5']:.1%}" for way, key in ways)
            parts.append(f"{name} {', '.join(shown)}")
    return "; ".join(parts)


def _total(skipped: Counter[str], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Counts over all ranks. What the index left out every rank has counted; images are read by one rank each."""
    if group is None:
        return dict(skipped)
    counts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, dict(skipped), group=group)
    unreadable = sum(count.pop("unreadable_image", 0) for count in counts)
    return counts[0] | ({"unreadable_image": unreadable} if unreadable else {})
