"""A checkpoint in another package's form: the same tensors, bit for bit, under its names, with its configs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastclip.models import hf_config
from fastclip.models.checkpoint import check_fit, empty_model, read_checkpoint, write_weights
from fastclip.models.config import CLIPConfig
from fastclip.models.files import CONFIG, SUFFIXES, WEIGHTS, find_weights, locate, tokenizer_files
from fastclip.models.layouts import from_native, to_native

_FILES = {"open_clip": "open_clip_model.safetensors", "openai": "model.pt", "hf": WEIGHTS}


@dataclass(frozen=True)
class Converted:
    """What was written."""

    config: CLIPConfig
    weights: Path
    files: tuple[str, ...]
    parameters: int
    dtypes: tuple[str, ...]


def convert(source: str | Path, target: str | Path, layout: str, model: str | CLIPConfig | None = None) -> Converted:
    """Write the checkpoint `source` (see `load_checkpoint`) into `target` as `layout` has it, one of `LAYOUTS`.

    target: a folder, which gets the weights, the configs and the tokenizer that lies beside the source; or a file
        (.safetensors, .pt), which gets the weights alone.
    model: the name or config of a source that has none beside it.
    Nothing is computed with and no type is changed, so that a way there and back gives the same bytes.
    Raises ValueError with all that differs for a source that does not fit its config, or with the reason for a model
    that the layout cannot hold; FileExistsError rather than overwrite. Nothing is written then.
    """
    weights = find_weights(locate(str(source)) or source)
    config, raw = read_checkpoint(weights, model)
    native = to_native(raw, config)
    check_fit(empty_model(config), native, weights)
    state = from_native(native, config, layout)
    target = Path(target)
    is_file = target.suffix in SUFFIXES
    written = target if is_file else target / _FILES[layout]
    extra = {} if is_file else _beside(config, layout, weights.parent)
    for path in (written, *(target / name for name in extra)):
        if path.exists():
            raise FileExistsError(f"{path} exists: name another target, or remove it")
    written.parent.mkdir(parents=True, exist_ok=True)
    write_weights(written, state)
    for name, content in extra.items():
        if isinstance(content, Path):
            shutil.copyfile(content, target / name)
        else:
            (target / name).write_text(json.dumps(content, indent=2) + "\n")
    return Converted(config, written, (written.name, *extra), _count(native), _dtypes(native))


def _beside(config: CLIPConfig, layout: str, folder: Path) -> dict[str, Path | dict]:
    """What lies beside the weights: name -> file to copy, or JSON."""
    files: dict[str, Path | dict] = dict(tokenizer_files(folder))
    if layout == "hf":
        files[hf_config.CONFIG] = hf_config.to_hf(config)
        files[hf_config.PREPROCESSOR] = hf_config.to_hf_preprocessor(config)
        return files
    return files | {CONFIG: config.to_dict()}


def _count(state: dict[str, Tensor]) -> int:
    return sum(value.numel() for name, value in state.items() if "running_" not in name and "num_batches" not in name)


def _dtypes(state: dict[str, Tensor]) -> tuple[str, ...]:
    kinds = {value.dtype for value in state.values() if value.is_floating_point()}
    return tuple(sorted(str(kind).removeprefix("torch.") for kind in kinds))
