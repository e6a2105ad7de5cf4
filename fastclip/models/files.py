"""Where a model's files are (a run, a folder, the Hugging Face cache) and what they hold."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastclip.models import hf_config
from fastclip.models.config import CLIPConfig
from fastclip.models.torchscript import is_torchscript, read_torchscript

WEIGHTS = "model.safetensors"
CONFIG = "open_clip_config.json"
LATEST = "latest"
STEPS = "checkpoints"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
HUB, LOCAL = "hf-hub:", "local-dir:"

# What a folder may hold, the first that is there; an index lists the parts of a large model.
_INDEX = f"{WEIGHTS}.index.json"
_NAMES = (WEIGHTS, "open_clip_model.safetensors", _INDEX, "open_clip_pytorch_model.bin", "pytorch_model.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_STEP = re.compile(r"step_\d+")


def locate(name: str | Path) -> Path | None:
    """The folder or file that `local-dir:PATH`, `hf-hub:ORG/NAME` or an existing path means; None for another name.

    Raises FileNotFoundError where it is not there.
    """
    text = str(name)
    if text.startswith(HUB):
        return _from_hub(text.removeprefix(HUB))
    path = Path(text.removeprefix(LOCAL))
    if text.startswith(LOCAL) and not path.exists():
        raise FileNotFoundError(f"no model at {path}: it does not exist")
    return path if text.startswith(LOCAL) or isinstance(name, Path) else None


def resolve_checkpoint(path: str | Path) -> Path:
    """The step folder that `path` means: itself, the parent of a file, or the latest step of a run folder.

    The latest step is the one that the run's file `latest` names, or the last complete one where that is gone.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: it does not exist")
    if path.is_file():
        return path.parent
    if _weights_in(path):
        return path
    steps = path / STEPS if (path / STEPS).is_dir() else path
    complete = {step.name: step for step in steps.glob("step_*") if _STEP.fullmatch(step.name) and _weights_in(step)}
    for pointer in (path / LATEST, steps / LATEST):
        if pointer.is_file():
            named = Path(pointer.read_text().strip()).name
            if named in complete:
                return complete[named]
    if not complete:
        raise FileNotFoundError(f"no checkpoint in {path}: it holds neither {WEIGHTS} nor {STEPS}/step_*/{WEIGHTS}")
    return complete[max(complete)]


def find_weights(path: str | Path) -> Path:
    """The file of weights that a run, a folder or a file means. Raises FileNotFoundError where there is none."""
    path = Path(path)
    found = path if path.is_file() else _weights_in(resolve_checkpoint(path))
    assert found is not None
    return found


def find_config(weights: Path) -> CLIPConfig | None:
    """The config beside a file of weights, open_clip's or Hugging Face's; None where there is none.

    Raises ValueError for a config that is not one.
    """
    ours, theirs = weights.parent / CONFIG, weights.parent / hf_config.CONFIG
    beside = ours if ours.is_file() else theirs
    try:
        if ours.is_file():
            return CLIPConfig.from_dict(json.loads(ours.read_text()))
        if theirs.is_file():
            preprocessor = weights.parent / hf_config.PREPROCESSOR
            prepared = json.loads(preprocessor.read_text()) if preprocessor.is_file() else None
            return hf_config.from_hf(json.loads(theirs.read_text()), prepared)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{beside} is not a model config: {error}") from error
    return None


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer that lies beside the weights: name -> file."""
    return {name: folder / name for name in _TOKENIZERS if (folder / name).is_file()}


def read_weights(path: Path) -> Mapping[str, Any]:
    """What a file of weights holds: safetensors, an index of them, a pickle of tensors alone, or OpenAI's archive.

    Raises ValueError for a file that is broken or holds something else; nothing in it is run.
    """
    try:
        content = _reader(path)(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors, pickle and zip each raise their own
        raise ValueError(f"{path} cannot be read as a file of weights: {_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _reader(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file
    if path.name.endswith(".index.json"):
        return _read_parts
    return read_torchscript if is_torchscript(path) else partial(torch.load, map_location="cpu", weights_only=True)


def _read_parts(index: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: value for part in parts for name, value in load_file(index.parent / part).items()}


def _reason(error: Exception) -> str:
    text = str(error)
    forbidden = re.search(r"GLOBAL ([\w.]+)", text)
    if forbidden and isinstance(error, pickle.UnpicklingError):
        return f"it holds {forbidden[1]}, which could run code; only tensors and plain values are read"
    if "weights_only" in text:
        return "it is no file of tensors"
    return text.splitlines()[0] if text else type(error).__name__


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def _from_hub(repository: str) -> Path:
    """The folder of a model on the Hugging Face hub: its files are downloaded, or were and lie in the cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModuleNotFoundError(f"{HUB}{repository} needs huggingface_hub: pip install huggingface_hub") from error
    wanted = [*_NAMES, "model-*.safetensors", CONFIG, hf_config.CONFIG, hf_config.PREPROCESSOR, *_TOKENIZERS]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # offline, unknown, private: each has its own class, by version of the package
        raise FileNotFoundError(
            f"{HUB}{repository} is neither in the local Hugging Face cache nor can it be downloaded: {_reason(error)}"
        ) from error
    if _weights_in(folder) is None:
        raise FileNotFoundError(f"{HUB}{repository} holds none of {', '.join(_NAMES)} (looked in {folder})")
    return folder
