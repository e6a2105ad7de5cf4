"""Every held-out set of a folder, evaluated: what `fastclip eval`, a training run and the report share."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastclip.data import EvalSet, Tokenizer
from fastclip.errors import UserError
from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.gallery import Gallery
from fastclip.evaluation.retrieval import retrieval
from fastclip.evaluation.zero_shot import zero_shot, zero_shot_classifier

HELD_OUT = "_test"


def has_eval_sets(folder: str | Path) -> bool:
    """Whether `folder` holds `<name>_test-*.tar` shards."""
    return any(Path(folder).glob(f"*{HELD_OUT}-*.tar"))


def eval_sets(folder: str | Path, tokenizer: Tokenizer, image_size: int) -> dict[str, EvalSet]:
    """The held-out sets of `folder` by name: all shards `<name>_test-*.tar` are the set "<name>_test"."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no held-out data at {folder}: it is not a folder")
    names = sorted({path.name.rpartition("-")[0] for path in folder.glob(f"*{HELD_OUT}-*.tar")})
    if not names:
        raise UserError(f"no held-out data in {folder}: it must hold shards named <name>{HELD_OUT}-00000.tar")
    return {name: EvalSet(sorted(folder.glob(f"{name}-*.tar")), tokenizer, image_size) for name in names}


def evaluate_folder(encoder: Encoder, folder: str | Path, with_gallery: bool = False) -> dict[str, Any]:
    """{"data": folder, "sets": {name: figures}}, and "gallery" when asked for; the same on every rank.

    A set with `<name>.classes.json` ({"classnames": [...], "templates": [...]}) and a "label" in each record is
    classified zero-shot; any other is retrieved by its captions.
    """
    sets: dict[str, Any] = {}
    gallery = Gallery()
    for name, eval_set in eval_sets(folder, encoder.tokenizer, encoder.config.vision.image_size).items():
        classes = _classes(Path(folder) / f"{name}.classes.json")
        images = encoder.images(eval_set)
        if classes is not None and eval_set.labels is not None:
            classifier = zero_shot_classifier(encoder.texts, **classes)
            figures = {"task": "zero_shot", "images": len(images), **zero_shot(images, classifier, eval_set.labels)}
            sets[name] = figures | classes
            gallery.add_classes(eval_set, images, classifier, classes["classnames"])
        else:
            texts = encoder.texts(eval_set.captions)
            figures = {"task": "retrieval", "images": len(images), "texts": len(texts)}
            sets[name] = figures | retrieval(images, texts, eval_set.caption_image)
            gallery.add_pairs(eval_set, images, texts)
        sets[name]["skipped"] = _total(eval_set.skipped, encoder.group)
    results = {"data": str(folder), "sets": sets}
    return results | {"gallery": gallery.to_dict()} if with_gallery else results


def summary(results: dict[str, Any]) -> str:
    """The figures in one line."""
    parts = []
    for name, figures in results["sets"].items():
        if figures["task"] == "zero_shot":
            parts.append(f"{name} top-1 {figures['top1']:.1%}")
        else:
            ways = (("image->text", "image_to_text"), ("text->image", "text_to_image"))
            shown = (f"{way} R@1 {figures[key]['R@1']:.1%} R@5 {figures[key]['R@5']:.1%}" for way, key in ways)
            parts.append(f"{name} {', '.join(shown)}")
    return "; ".join(parts)


def _classes(path: Path) -> dict[str, list[str]] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        return {key: [str(text) for text in content[key]] for key in ("classnames", "templates")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} must hold {{"classnames": [...], "templates": [...]}}: {error!r}') from error


def _total(skipped: Counter[str], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Counts over all ranks. What the index left out every rank has counted; images are read by one rank each."""
    if group is None:
        return dict(skipped)
    counts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, dict(skipped), group=group)
    unreadable = sum(count.pop("unreadable_image", 0) for count in counts)
    return counts[0] | ({"unreadable_image": unreadable} if unreadable else {})
