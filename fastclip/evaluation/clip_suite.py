"""What the CLIP paper measures of one held-out set beyond its accuracy or recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastclip.evaluation.calibration import calibration
from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.geometry import clouds
from fastclip.evaluation.linear_probe import linear_probe
from fastclip.evaluation.robustness import corruption_curves
from fastclip.evaluation.sets import HeldOut, training_part

PROBE_IMAGES = 2048


def clip_suite(
    encoder: Encoder, folder: str | Path, held_out: HeldOut, images: Tensor, texts: Tensor
) -> dict[str, Any]:
    """Of a set to classify: "calibration", "corruptions", and "linear_probe" where labelled training images are there;
    of a set to retrieve: "clouds". Every rank makes the same forwards and has the same figures.

    Args:
        folder: where the set lies.
        images, texts: its image features, and its classifier or the features of its captions.
    """
    if held_out.task == "retrieval":
        return {"clouds": clouds(images, texts, held_out.caption_image)} if min(len(images), len(texts)) > 1 else {}
    if held_out.task == "multi_label" or held_out.labels is None:
        return {}
    found: dict[str, Any] = {
        "calibration": calibration(images, texts, held_out.labels, encoder.logit_scale()),
        "corruptions": corruption_curves(encoder, held_out, texts),
    }
    part = training_part(folder, held_out, encoder.tokenizer, encoder.config.vision.image_size, PROBE_IMAGES)
    if part is not None and len(part[1].unique()) > 1:
        source, labels = part
        found["linear_probe"] = linear_probe(encoder.images(source), labels, images, held_out.labels)
    return found
