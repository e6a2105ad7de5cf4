"""For who comes from open_clip: its command line as a config, and its `epoch_N.pt` as something to go on from.

Flags as in open_clip 3 (`open_clip_train/params.py`). What has no counterpart is named, never dropped in silence.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.errors import UserError

# flag -> our field, where the value is the same
SAME = {
    "train-data": "data", "train-data-upsampling-factors": "upsampling", "csv-img-key": "image_key",
    "csv-caption-key": "caption_key", "model": "model", "workers": "workers", "lr": "lr", "eps": "eps",
    "wd": "weight_decay", "warmup": "warmup", "seed": "seed", "grad-clip-norm": "grad_clip",
    "log-every-n-steps": "log_every", "lock-image-unlocked-groups": "image_unlocked",
    "lock-text-unlocked-layers": "text_unlocked", "resume": "resume",
}  # fmt: skip
COCA = {
    "coca-contrastive-loss-weight": ("contrastive_weight", 1.0),
    "coca-caption-loss-weight": ("caption_weight", 2.0),
}
SWITCHES = {"lock-image": "lock_image", "lock-text": "lock_text", "torchcompile": "compile"}
# What needs no translation, and why.
NEEDLESS = {
    "local-loss": "the loss is the same whichever rank computes it",
    "gather-with-grad": "the gradient is always that of the whole batch",
    "dataset-type": "shards are recognised",
    "train-num-samples": "",
    "dataset-resampled": "",
    "epochs": "",
    "batch-size": "",
    "accum-freq": "chunks change no gradient here",
    "beta1": "",
    "beta2": "",
    "precision": "",
    "lr-scheduler": "",
    "epochs-cooldown": "",
    "opt": "",
    "logs": "",
    "name": "",
    "report-to": "",
    "wandb-project-name": "",
    "pretrained": "",
    "force-quick-gelu": "",
    "save-frequency": "",
    "delete-previous-checkpoint": "the last `keep` checkpoints stay",
    "save-most-recent": "`latest` always names the last",
    "lock-image-freeze-bn-stats": "locked batch norm always goes by its running statistics",
    "ddp-static-graph": "there is no DDP",
    "no-set-device-rank": "a launcher sets the device",
    "debug": "",
    "grad-checkpointing": "",
}  # fmt: skip
VALUELESS = {
    "dataset-resampled", "log-local", "use-bn-sync", "skip-scheduler", "save-most-recent", "pretrained-image",
    "lock-image", "lock-image-freeze-bn-stats", "grad-checkpointing", "local-loss", "gather-with-grad",
    "force-quick-gelu", "force-custom-text", "torchscript", "torchcompile", "trace", "debug", "copy-codebase",
    "horovod", "ddp-static-graph", "no-set-device-rank", "lock-text",
    "lock-text-freeze-layer-norm", "delete-previous-checkpoint", "siglip",
}  # fmt: skip
SCHEDULES = {"cosine": "open_clip", "const": "constant"}
PRECISIONS = {"amp": "bf16", "amp_bf16": "bf16", "amp_bfloat16": "bf16", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}


def translate(command_line: str) -> tuple[dict[str, Any], list[str]]:
    """(values for `with_values`, a line for each flag that has no counterpart or another meaning here).

    The launcher may stand in front (`torchrun --nproc_per_node 8 -m open_clip_train.main ...`): the global batch is its
    ranks times --batch-size times --accum-freq.
    """
    launcher, flags = _flags(shlex.split(command_line))
    is_resnet = flags.get("model", "RN50").startswith("RN")
    values: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.2, "warmup": 10_000, "decay_embeddings": True}
    values |= {"model": "RN50", "eps": 1e-8 if is_resnet else 1e-6, "schedule": "open_clip", "log_every": 100}
    values |= {field: flags[flag] for flag, field in SAME.items() if flag in flags}
    values |= {field: True for flag, field in SWITCHES.items() if flag in flags}
    values["betas"] = [flags.get("beta1", 0.9), flags.get("beta2", 0.999 if is_resnet else 0.98)]
    notes: list[str] = []
    ranks = _ranks(launcher)
    if ranks is None:
        notes.append("the number of ranks is not in it: --global-batch assumes one")
    values["global_batch"] = (ranks or 1) * int(flags.get("batch-size", 64)) * int(flags.get("accum-freq", 1))
    chunk = int(flags.get("batch-size", 64))
    values["chunk_size"] = chunk if int(flags.get("accum-freq", 1)) > 1 else 0
    epochs = int(flags.get("epochs", 32))
    if "train-num-samples" in flags:
        batches = math.ceil(int(flags["train-num-samples"]) / values["global_batch"])
        values["steps"] = epochs * batches
        values["resampled"] = int(flags["train-num-samples"]) if "dataset-resampled" in flags else 0
        values["save_every"] = int(flags.get("save-frequency", 1)) * batches
        if "epochs-cooldown" in flags:
            values["cooldown"] = int(flags["epochs-cooldown"]) / epochs
    else:
        notes.append(f"--train-num-samples is not in it: set --steps to {epochs} epochs")
    notes += _choices(flags, values)
    known = set(SAME) | set(SWITCHES) | set(NEEDLESS)
    if values["model"].startswith("coca"):
        values |= {field: flags.get(flag, default) for flag, (field, default) in COCA.items()}
        known |= set(COCA)
    unknown = {flag: "" if flag in VALUELESS else f" {value}" for flag, value in flags.items() if flag not in known}
    notes += [f"--{flag}{value}: no counterpart" for flag, value in unknown.items()]
    return values, notes


def _choices(flags: Mapping[str, str], values: dict[str, Any]) -> list[str]:
    """What has other names here, into `values`; the notes."""
    notes = []
    scheduler = flags.get("lr-scheduler", "cosine")
    if "skip-scheduler" in flags or scheduler not in SCHEDULES:
        values["schedule"] = "constant" if "skip-scheduler" in flags else "wsd"
        if scheduler == "const-cooldown":
            notes.append("--lr-scheduler const-cooldown: wsd, whose cooldown falls by a square root instead of a line")
    else:
        values["schedule"] = SCHEDULES[scheduler]
    precision = flags.get("precision", "amp")
    values["precision"] = PRECISIONS.get(precision, "bf16")
    if precision == "amp" or precision not in PRECISIONS:
        notes.append(f"--precision {precision}: bf16")
    optimizer = flags.get("opt", "adamw").removeprefix("timm/")
    values["optimizer"] = optimizer if optimizer in ("adamw", "lamb", "lion", "muon") else "adamw"
    if optimizer != values["optimizer"]:
        notes.append(f"--opt {optimizer}: adamw")
    values["recompute"] = "full" if "grad-checkpointing" in flags else "none"
    if "force-quick-gelu" in flags:
        values["model"] += "-quickgelu"
    pretrained = flags.get("pretrained", "")
    if pretrained and Path(pretrained).exists():
        values["init"] = pretrained
    elif pretrained:
        notes.append(f"--pretrained {pretrained}: give its file by --init")
    if "name" in flags:
        values["out"] = str(Path(flags.get("logs", "./logs/")) / flags["name"])
    report = flags.get("report-to", "")
    values["tensorboard"] = report in ("tensorboard", "all")
    values["wandb"] = flags.get("wandb-project-name", "open-clip") if report in ("wandb", "all") else ""
    notes += [f"--{flag}: {NEEDLESS[flag]}" for flag in flags if NEEDLESS.get(flag)]
    return notes


def _flags(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """(what starts it, its flags): the words up to open_clip's module or script, and those behind."""
    start = next((i + 1 for i, word in enumerate(words) if "open_clip_train" in word or word.endswith("main.py")), 0)
    flags: dict[str, str] = {}
    rest = words[start:]
    place = 0
    while place < len(rest):
        flag, has_value, value = rest[place].partition("=")
        if not flag.startswith("--"):
            raise UserError(f"--from-open-clip: {rest[place]!r} is no flag and belongs to none")
        name = flag[2:].replace("_", "-")
        place += 1
        if name in VALUELESS:
            value = "True"
        elif not has_value:
            if place == len(rest) or rest[place].startswith("--"):
                raise UserError(f"--from-open-clip: {flag} has no value")
            value = rest[place]
            place += 1
        flags[name] = value
    return words[:start], flags


def _ranks(launcher: list[str]) -> int | None:
    """Processes that torchrun or srun starts, if it says so."""
    joined = [part for word in launcher for part in word.split("=")]
    found: dict[str, int] = {}
    for word, value in pairwise(joined):
        name = word.lstrip("-").replace("-", "_")
        if name in ("nproc_per_node", "nnodes", "ntasks", "nodes", "ntasks_per_node") and value.isdigit():
            found[name] = int(value)
    if "ntasks" in found:
        return found["ntasks"]
    per_node = found.get("nproc_per_node", found.get("ntasks_per_node"))
    return None if per_node is None else per_node * found.get("nnodes", found.get("nodes", 1))


def is_open_clip_checkpoint(path: str) -> bool:
    """Whether --resume names a file that open_clip's trainer wrote."""
    return Path(path).suffix == ".pt" and Path(path).is_file()


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """(weights, moments by "key/parameter" with "step", optimizer steps done) of an `epoch_N.pt`.

    Its AdamW numbers the parameters: first those without decay (fewer than two dimensions), then the rest, each in the
    model's order, which is that of the state dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state, optimizer = content["state_dict"], content["optimizer"]
        counts = [len(group["params"]) for group in optimizer["param_groups"]]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--resume {path} is not a checkpoint of open_clip's trainer: {reason}") from error
    weights = {name.removeprefix("module.").removeprefix("text."): value for name, value in state.items()}
    names = [name for name, value in weights.items() if value.is_floating_point() and "running_" not in name]
    plain = [name for name in names if weights[name].ndim < 2 or name == "logit_scale"]
    order = plain + [name for name in names if name not in plain]
    wanted = [len(plain), len(order) - len(plain)]
    if counts != wanted:
        raise UserError(
            f"--resume {path}: its optimizer has groups of {counts} parameters, AdamW over all of them has {wanted}: "
            "locked towers and other optimizers cannot be taken up, use --init"
        )
    moments: dict[str, Tensor] = {}
    for number, one in optimizer["state"].items():
        name = order[int(number)]
        moments["step"] = torch.as_tensor(one["step"]).float().reshape(())
        for key in ("exp_avg", "exp_avg_sq"):
            moments[f"{key}/{name}"] = one[key].float().reshape(weights[name].shape or (1,))
    return weights, moments, int(moments["step"]) if moments else 0
