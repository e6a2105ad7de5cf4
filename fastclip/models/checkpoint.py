"""Models from files and back: a folder with `model.safetensors` and `open_clip_config.json`, or a file of weights.

Checkpoints of OpenAI, open_clip and Hugging Face are read as they are. One that does not fit is refused with the whole
list of what differs, before anything is loaded.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.models.clip import CLIP
from fastclip.models.config import CLIPConfig
from fastclip.models.files import (
    CONFIG,
    LATEST,
    STEPS,
    SUFFIXES,
    WEIGHTS,
    find_config,
    find_weights,
    locate,
    read_weights,
    resolve_checkpoint,
)
from fastclip.models.infer import openai_config
from fastclip.models.layouts import from_native, is_openai, to_native
from fastclip.models.positions import resize_positions
from fastclip.models.presets import get_config

__all__ = [
    "CONFIG",
    "LATEST",
    "STEPS",
    "WEIGHTS",
    "LoadedModel",
    "load_checkpoint",
    "load_weights",
    "resolve_checkpoint",
    "save_model",
]

# Who trained with QuickGELU, and who did not, as their files and repositories are named
_QUICK_GELU = re.compile(r"openai|metaclip|dfn", re.IGNORECASE)
_PLAIN_GELU = re.compile(r"laion|datacomp|commonpool", re.IGNORECASE)


@dataclass(frozen=True)
class LoadedModel:
    """A model, the config it was built from, and the folder its files lie in."""

    model: CLIP
    config: CLIPConfig
    folder: Path


def save_model(
    directory: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    config: CLIPConfig,
    extra_files: Mapping[str, str | Path] | None = None,
) -> None:
    """Write `model.safetensors` and `open_clip_config.json` into `directory`, and copy `extra_files` (name -> source).

    open_clip reads the folder (`local-dir:`), where it has such a model.
    model: the module, wrapped by DDP or torch.compile or not, or its state dict, in the dtype it shall be kept in.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    write_weights(folder / WEIGHTS, from_native(state, config))
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    for name, source in (extra_files or {}).items():
        shutil.copyfile(source, folder / name)


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """A safetensors file of the tensors as they are, or for another suffix a pickle of them."""
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if path.suffix != ".safetensors":
        torch.save(plain, path)
        return
    from safetensors.torch import save_file

    whole = {name: value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
             for name, value in plain.items()}  # fmt: skip
    save_file(whole, path, metadata={"format": "pt"})


def load_checkpoint(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    model: str | CLIPConfig | None = None,
) -> LoadedModel:
    """Load a model in eval mode from a run folder (its latest step), a step folder, or a file of weights.

    path: also `hf-hub:ORG/NAME` (from the local cache where the hub cannot be reached) and `local-dir:PATH`.
    dtype: of every float parameter and buffer; default float32.
    model: name or config of the model; needed for a file without a config beside it that is not OpenAI's.
    Raises FileNotFoundError when there is nothing to load, ValueError listing every difference when it does not fit.
    """
    weights = find_weights(locate(path) or path)
    config, raw = read_checkpoint(weights, model)
    empty = empty_model(config)
    _put(empty, raw, weights, device, dtype)
    return LoadedModel(empty.eval(), config, weights.parent)


def empty_model(config: CLIPConfig, packed_text: bool = True) -> CLIP:
    """A model that waits for its weights: on the meta device, or where a wrapped tower has buffers of its own."""
    vision = replace(config.vision, timm_model_pretrained=False)
    text = replace(config.text, hf_model_pretrained=False)
    waiting = replace(config, vision=vision, text=text)
    is_wrapped = config.vision.is_wrapped or config.text.is_wrapped
    with torch.device("cpu" if is_wrapped else "meta"):
        model = CLIP(waiting, packed_text)
    model.config = config
    return model


def load_weights(
    model: CLIP,
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    resize: bool = False,
) -> CLIP:
    """Put the weights at `path` (see `load_checkpoint`) into `model`, whole or not at all; returns it.

    The tensors of the file replace those of the model, which may therefore live on the meta device.
    resize: position embeddings of another image size or context length are interpolated.
    """
    weights = find_weights(locate(path) or path)
    return _put(model, read_weights(weights), weights, device, dtype, resize)


def read_checkpoint(weights: Path, model: str | CLIPConfig | None = None) -> tuple[CLIPConfig, Mapping[str, Any]]:
    """A file's config (named, or beside it, or the one that OpenAI's file implies) and what it holds."""
    config = get_config(model) if isinstance(model, str) else model or find_config(weights)
    raw = read_weights(weights) if config is not None or weights.suffix in SUFFIXES else {}
    if config is None and not is_openai(raw):
        raise ValueError(f"model must be named: there is no {CONFIG} beside {weights}")
    return config or openai_config(raw), raw


def _put(
    model: CLIP,
    raw: Mapping[str, Any],
    source: Path,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    resize: bool = False,
) -> CLIP:
    state = to_native(raw, model.config)
    if resize:
        state = resize_positions(state, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    check_fit(model, state, source)
    _warn_of_activation(model.config, raw, source)
    target = dtype or torch.float32
    placed = {
        name: value.to(device or "cpu", target if value.is_floating_point() else None).contiguous()
        for name, value in state.items()
    }
    model.load_state_dict(placed, assign=True)
    return model


def _warn_of_activation(config: CLIPConfig, raw: Mapping[str, Any], source: Path) -> None:
    """The weights of one activation load into a model of the other without a word, and cost several points."""
    name = "/".join(source.parts[-4:])
    if not config.quick_gelu and not config.vision.is_wrapped and (is_openai(raw) or _QUICK_GELU.search(name)):
        warnings.warn(
            f"{source} looks trained with QuickGELU, but the model computes GELU: "
            'name it with "-quickgelu" ("ViT-B-32-quickgelu"), or say "quick_gelu": true in its config',
            stacklevel=4,
        )
    elif config.quick_gelu and not is_openai(raw) and _PLAIN_GELU.search(name):
        warnings.warn(
            f"{source} looks trained with GELU, but the model computes QuickGELU: "
            'name it without "-quickgelu", or say "quick_gelu": false in its config',
            stacklevel=4,
        )


def check_fit(model: CLIP, state: Mapping[str, Any], source: Path) -> None:
    """Raise one ValueError that names every missing, unexpected and wrong-shaped entry."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}
    for name in ("logit_scale", "logit_bias"):
        if found.get(name) == (1,):  # as open_clip's FSDP checkpoints and Hugging Face's SigLIP hold it
            found[name] = ()
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    wrong = [
        f"{name} is {found[name]}, must be {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if missing or unexpected or wrong:
        lines = [f"{source} does not fit the model:"]
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
            lines += [f"  {title} ({len(names)}): {', '.join(names)}"] if names else []
        if any("positional_embedding" in line for line in wrong):
            lines.append("  for another image size or context length say force_image_size or force_context_length")
        raise ValueError("\n".join(lines))
