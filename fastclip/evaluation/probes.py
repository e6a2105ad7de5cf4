"""What a user's file asks of a model: associations of prompts with groups, and robustness beside other models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastclip.errors import UserError
from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.geometry import associations
from fastclip.evaluation.robustness import baseline_fit, effective_robustness
from fastclip.evaluation.sets import find_sets

_BIAS = '{"prompts": [...], "groups": {name: [texts]}} or {"prompts": [...], "set": name}'
_BASELINE = '{"reference": set, "shifts": {set: [[accuracy on the reference, under the shift], ...]}}'


def bias_probe(encoder: Encoder, file: Path, data: Path, split: str = "test") -> dict[str, Any]:
    """`associations` of the file's prompts with its groups of texts, or with the images of each class of a set."""
    asked = _read(file, _BIAS)
    try:
        prompts = list(dict.fromkeys(str(prompt) for prompt in asked["prompts"]))
        groups = {str(name): [str(text) for text in texts] for name, texts in asked.get("groups", {}).items()}
        name = asked.get("set")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} must hold {_BIAS}: {error!r}") from error
    if not prompts or bool(groups) == bool(name):
        raise UserError(f"{file} must hold prompts, and either groups or a set: {_BIAS}")
    if name:
        sets = find_sets(data, encoder.tokenizer, encoder.config.vision.image_size, split)
        held_out = sets.get(str(name))
        if held_out is None or held_out.labels is None or held_out.task != "zero_shot":
            raise UserError(f"{file} names the set {name!r}, which is not among the sets with classes in {data}")
        features = encoder.images(held_out.images)
        members = {
            classname: features[held_out.labels == number] for number, classname in enumerate(held_out.classnames)
        }
        members = {classname: rows for classname, rows in members.items() if len(rows)}
    else:
        members = {group: encoder.texts(texts) for group, texts in groups.items()}
    directions = dict(zip(prompts, encoder.texts(prompts), strict=True))
    return {"prompts": prompts} | associations(members, directions)


def robustness_table(sets: dict[str, Any], file: Path) -> dict[str, Any]:
    """{"reference": set, "shifts": {set: effective_robustness(...)}} of the sets that were evaluated."""
    asked = _read(file, _BASELINE)
    try:
        reference = str(asked["reference"])
        points = {str(name): [(float(x), float(y)) for x, y in rows] for name, rows in asked["shifts"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} must hold {_BASELINE}: {error!r}") from error
    missing = [name for name in (reference, *points) if "top1" not in sets.get(name, {})]
    if missing:
        raise UserError(
            f"{file} names {missing[0]!r}, which has no zero-shot accuracy here; there are {', '.join(sets)}"
        )
    own = sets[reference]["top1"]
    shifts = {name: effective_robustness(own, sets[name]["top1"], baseline_fit(rows)) for name, rows in points.items()}
    return {"reference": reference, "shifts": shifts}


def _read(file: Path, form: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} must hold {form}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold {form}")
    return content
