"""Model files: a folder with `model.safetensors` and `open_clip_config.json`, or a single file of weights.

Weights carry OpenAI's and open_clip's names. A checkpoint that does not fit is refused with the whole list of what
differs, before anything is loaded.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.models.clip import CLIP
from fastclip.models.config import CLIPConfig
from fastclip.models.presets import get_config

WEIGHTS = "model.safetensors"
CONFIG = "open_clip_config.json"
LATEST = "latest"
STEPS = "checkpoints"

_STEP = re.compile(r"step_\d+")
_WRAPPERS = ("module.", "_orig_mod.")
_NOT_WEIGHTS = frozenset({"input_resolution", "context_length", "vocab_size", "attn_mask"})
_TEXT_PREFIX = "text."  # open_clip's CustomTextCLIP


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

    model: the module, wrapped by DDP or torch.compile or not, or its state dict, in the dtype it shall be kept in.
    """
    from safetensors.torch import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = normalize_state_dict(model.state_dict() if isinstance(model, nn.Module) else model)
    state["logit_scale"] = state["logit_scale"].reshape(())
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    for name, source in (extra_files or {}).items():
        shutil.copyfile(source, folder / name)


def load_checkpoint(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    model: str | CLIPConfig | None = None,
) -> LoadedModel:
    """Load a model in eval mode from a run folder (its latest step), a step folder, or a file of weights.

    dtype: of every float parameter and buffer; default float32.
    model: name or config of the model; needed for a file that has no `open_clip_config.json` beside it.
    Raises FileNotFoundError when there is nothing to load, ValueError listing every difference when it does not fit.
    """
    path = Path(path)
    weights = path if path.is_file() else resolve_checkpoint(path) / WEIGHTS
    config = _config_for(weights, model)
    with torch.device("meta"):
        empty = CLIP(config)
    return LoadedModel(load_weights(empty, weights, device=device, dtype=dtype).eval(), config, weights.parent)


def resolve_checkpoint(path: str | Path) -> Path:
    """The step folder that `path` means: itself, the parent of a file, or the latest step of a run folder.

    The latest step is the one that the run's file `latest` names, or the last complete one where that is gone.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: it does not exist")
    if path.is_file():
        return path.parent
    if _has_weights(path):
        return path
    steps = path / STEPS if (path / STEPS).is_dir() else path
    complete = {step.name: step for step in steps.glob("step_*") if _STEP.fullmatch(step.name) and _has_weights(step)}
    for pointer in (path / LATEST, steps / LATEST):
        if pointer.is_file():
            named = Path(pointer.read_text().strip()).name
            if named in complete:
                return complete[named]
    if not complete:
        raise FileNotFoundError(f"no checkpoint in {path}: it holds neither {WEIGHTS} nor {STEPS}/step_*/{WEIGHTS}")
    return complete[max(complete)]


def load_weights(
    model: CLIP,
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CLIP:
    """Put the weights at `path` (run folder, step folder or file) into `model`, whole or not at all; returns it.

    The tensors of the file replace those of the model, which may therefore live on the meta device.
    """
    path = Path(path)
    source = path if path.is_file() else resolve_checkpoint(path) / WEIGHTS
    state = normalize_state_dict(_read_file(source))
    _check_fit(model, state, source)
    target = dtype or torch.float32
    placed = {
        name: value.to(device or "cpu", target if value.is_floating_point() else None) for name, value in state.items()
    }
    model.load_state_dict(placed, assign=True)
    return model


def normalize_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Bring a checkpoint of open_clip or OpenAI to the names of `CLIP`.

    Unwraps {"state_dict": ...}, drops the prefixes of DDP, torch.compile and open_clip's CustomTextCLIP, and OpenAI's
    entries that are no weights.
    """
    inner = state.get("state_dict", state)
    result: dict[str, Tensor] = {}
    for name, value in inner.items():
        for prefix in _WRAPPERS:
            name = name.removeprefix(prefix)
        if name.removeprefix(_TEXT_PREFIX) not in _NOT_WEIGHTS:
            result[name.removeprefix(_TEXT_PREFIX)] = value
    return result


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def _config_for(weights: Path, model: str | CLIPConfig | None) -> CLIPConfig:
    if model is not None:
        return get_config(model) if isinstance(model, str) else model
    beside = weights.parent / CONFIG
    if not beside.is_file():
        raise ValueError(f"model must be named: there is no {CONFIG} beside {weights}")
    try:
        return CLIPConfig.from_dict(json.loads(beside.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{beside} is not a model config: {error}") from error


def _read_file(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as read
    else:
        read = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        content = read(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors, pickle and zip each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a file of weights: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _check_fit(model: CLIP, state: Mapping[str, Any], source: Path) -> None:
    """Raise one ValueError that names every missing, unexpected and wrong-shaped entry."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}
    if found.get("logit_scale") == (1,):  # as open_clip's FSDP checkpoints hold it
        found["logit_scale"] = ()
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
        raise ValueError("\n".join(lines))
