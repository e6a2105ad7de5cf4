"""DeepSpeed's JSON: every key that matters is written out, and what is silently wrong for CLIP is refused."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastclip.errors import UserError
from fastclip.training.config import TrainConfig

_REFUSED = {
    "gradient_accumulation_steps": "GradCache makes the chunks of a step: set --chunk-size instead",
    "managed_gradient_accumulation": "the engine marks the end of a step itself: set --reduction instead",
    "train_batch_size": "it is the run's: set --global-batch instead",
    "train_micro_batch_size_per_gpu": "it is global_batch / ranks: set --global-batch instead",
    "optimizer": "the run builds it: set --optimizer, --lr and --weight-decay instead",
    "scheduler": "the loop sets the learning rate: set --schedule and --warmup instead",
    "amp": "apex.amp no longer exists: set --precision instead",
}
# What else a file may hold; DeepSpeed itself ignores a misspelt key without a word.
_PASSED_ON = (
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "monitor_config",
    "seed",
    "sparse_gradients",
    "tensorboard",
    "timers",
    "torch_autocast",
    "wandb",
)


def resolve_deepspeed(config: TrainConfig, world_size: int) -> tuple[TrainConfig, dict[str, Any], list[str]]:
    """(config, DeepSpeed's JSON, conflicts): the JSON generated from `config` with the user's file over it.

    What the file changes of the run's own settings (stage, precision, clipping) is changed in the returned config too.
    The conflicts are lines `key: user's value (was generated value)`.
    """
    generated = _generated(config, world_size)
    if not config.deepspeed_config:
        return config, generated, []
    user = _read(config.deepspeed_config, generated)
    merged = _over(generated, user)
    if merged.get("torch_autocast", {}).get("dtype") == "float16":
        raise UserError("deepspeed_config sets torch_autocast to float16: use bfloat16, or --precision fp16 instead")
    if merged["bf16"]["enabled"] and merged["fp16"]["enabled"]:
        raise UserError("deepspeed_config enables both bf16 and fp16 for the run: disable one, or set --precision")
    precision: Any = "bf16" if merged["bf16"]["enabled"] else "fp16" if merged["fp16"]["enabled"] else "fp32"
    stage, clip = merged["zero_optimization"]["stage"], merged["gradient_clipping"]
    config = replace(config, precision=precision, zero_stage=stage, grad_clip=clip)
    return config, merged, conflicts(generated, user)


def conflicts(generated: dict[str, Any], user: dict[str, Any], where: str = "") -> list[str]:
    """Lines `key: user's value (was generated value)` for every key that the user's file changes."""
    lines = []
    for key, value in user.items():
        if isinstance(value, dict) and isinstance(generated.get(key), dict):
            lines += conflicts(generated[key], value, f"{where}{key}.")
        elif key in generated and value not in ("auto", generated[key]):
            lines.append(f"{where}{key}: {value} (was {generated[key]})")
    return lines


def _generated(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Why each key is explicit: `gradient_clipping` is 1.0 where it is left out (since DeepSpeed 0.19); accumulation is
    1 because GradCache makes the chunks of a step itself and marks their end; Muon needs whole gradients on every rank;
    `memory_efficient_linear` replaces F.linear in the whole process, which the engine does for its own passes alone;
    the tag of our checkpoints is the same everywhere, and asking all ranks for it takes longer than a snapshot.
    """
    unmanaged = {"managed_gradient_accumulation": False} if config.reduction == "unmanaged" else {}
    return {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "prescale_gradients": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": config.optimizer != "muon",
            "memory_efficient_linear": False,
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "checkpoint": {"tag_validation": "Ignore"},
        **unmanaged,
    }


def _read(path: str, generated: dict[str, Any]) -> dict[str, Any]:
    """The user's file less the keys that say what is so anyway."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"deepspeed_config {path} does not exist")
    try:
        user = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed_config {path} is not JSON: {error}") from error
    if not isinstance(user, dict):
        raise UserError(f"deepspeed_config {path} must hold a JSON object, was a {type(user).__name__}")
    for key, value in user.items():
        if key in _REFUSED and value not in ("auto", generated.get(key)):
            raise UserError(f"deepspeed_config {path} sets {key}: {_REFUSED[key]}")
        known = (*generated, *_REFUSED, *_PASSED_ON)
        if key not in known and (near := difflib.get_close_matches(key, known, n=1)):
            raise UserError(f"deepspeed_config {path}: unknown key {key!r}; did you mean {near[0]!r}?")
        if isinstance(generated.get(key), dict) and not isinstance(value, dict):
            raise UserError(f"deepspeed_config {path}: {key} must be an object, was {value!r}")
    return {key: value for key, value in user.items() if key not in _REFUSED}


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if value == "auto" and key in base:
            continue
        merged[key] = _over(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged
