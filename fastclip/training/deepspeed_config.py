"""DeepSpeed's JSON: every key that matters is written out, and settings that are silently wrong for CLIP are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastclip.errors import UserError
from fastclip.training.config import TrainConfig


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The JSON of a run: generated from `config`, then the user's file over it.

    Why each key is explicit: `gradient_clipping` is 1.0 where it is left out (since DeepSpeed 0.19); accumulation is 1
    because GradCache makes the chunks of a step itself and marks their end; the surrogates of a step add up undivided.
    """
    local_batch = config.global_batch // world_size
    generated: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": local_batch,
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
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    return _merged(generated, _read(config.deepspeed_config)) if config.deepspeed_config else generated


def conflicts(generated: dict[str, Any], user: dict[str, Any], where: str = "") -> list[str]:
    """Lines `key: user's value (generated value)` for every key the user's file changes."""
    lines = []
    for key, value in user.items():
        if isinstance(value, dict) and isinstance(generated.get(key), dict):
            lines += conflicts(generated[key], value, f"{where}{key}.")
        elif key in generated and generated[key] != value:
            lines.append(f"{where}{key}: {value} (was {generated[key]})")
    return lines


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"deepspeed_config {path} does not exist")
    try:
        user = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed_config {path} is not JSON: {error}") from error
    if not isinstance(user, dict):
        raise UserError(f"deepspeed_config {path} must hold a JSON object, was a {type(user).__name__}")
    return user


def _merged(generated: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
    wrong = {
        "gradient_accumulation_steps": "GradCache makes the chunks of a step: set --chunk-size instead",
        "train_batch_size": "it is the run's: set --global-batch instead",
        "train_micro_batch_size_per_gpu": "it is global_batch / ranks: set --global-batch instead",
        "optimizer": "the run builds it: set --optimizer, --lr and --weight-decay instead",
        "scheduler": "the loop sets the learning rate: set --schedule and --warmup instead",
        "amp": "apex.amp no longer exists: set --precision instead",
    }
    for key, reason in wrong.items():
        if key in user and user[key] not in ("auto", generated.get(key)):
            raise UserError(f"deepspeed_config sets {key}: {reason}")
    return _over(generated, {key: value for key, value in user.items() if key not in wrong})


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if value == "auto" and key in base:
            continue
        merged[key] = _over(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged
