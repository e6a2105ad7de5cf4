"""What a run is: one frozen dataclass, read from a recipe, a YAML file and the command line, in this order."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastclip.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: str = ""
    """Training shards: a folder (its train-*.tar), a glob, or a pattern such as 'laion/{00000..41455}.tar'."""
    val: str = ""
    """Folder of held-out sets in the layout that `fastclip data demo` writes; default: the folder of `data`."""
    tokenizer: str = ""
    """A tokenizers JSON or a model name; default: tokenizer.json beside the data if there is one, else CLIP's BPE."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the share of an image that the training crop keeps."""
    hard_negatives: bool = False
    """Beside each caption one with two words exchanged, or one replaced, as a further negative (NegCLIP, 2023)."""
    workers: int = 1
    """Processes per rank that decode images."""

    model: str = "ViT-B-32"
    """Name of the model (see fastclip.models.PRESETS)."""
    init: str = ""
    """Checkpoint to take the initial weights from; default: OpenAI's initialisation."""
    seed: int = 0
    """Of the weights and of the order of the data."""

    global_batch: int = 512
    """Pairs in one optimizer step, over all ranks: every pair sees all the others as negatives."""
    chunk_size: int = 0
    """Pairs a rank forwards at once (gradient caching: same gradient, less memory); 0 is all it has."""
    steps: int = 1000
    """Optimizer steps of the run."""
    minutes: float = 0.0
    """Ends the run after this wall-clock time, with the schedule following the clock; 0 is no limit."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the blocks' matrices with adamw for everything else (Jordan et al. 2024)."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon's matrices."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Of matrices that are no embeddings; gains, biases, embeddings and the scale have none."""
    warmup: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up: down to zero along half a cosine, or constant."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    loss_impl: Literal["auto", "reference", "dense", "cpu", "triton"] = "auto"
    """Implementation of the contrastive loss."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed (ZeRO), or torch alone with a plain all-reduce of the gradient."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of the model's computation; master weights and the loss are fp32."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 1 partitions the optimizer state, 2 the gradients too, 3 the weights too; 0 nothing."""
    deepspeed_config: str = ""
    """DeepSpeed JSON merged over the generated one; conflicts are shown, settings known to be wrong refused."""

    out: str = ""
    """Run folder; default runs/<model>-<date>."""
    resume: str = ""
    """"latest", or a run or step folder, to go on from; empty starts anew."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    save_every: int = 0
    """Steps between two checkpoints; 0 saves at the end only."""
    keep: int = 3
    """Checkpoints to keep."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    wandb: str = ""
    """Also log to this Weights & Biases project."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainConfig).items():
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            if choices and getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, was {getattr(self, name)!r}")
        least = {
            "global_batch": 1,
            "chunk_size": 0,
            "steps": 1,
            "minutes": 0,
            "workers": 0,
            "warmup": 0,
            "log_every": 1,
        }
        least |= {"eval_every": 0, "save_every": 0, "keep": 1, "grad_clip": 0, "lr": 0, "muon_lr": 0, "weight_decay": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} must be at least {low}, was {getattr(self, name)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"zero_stage must be 0, 1, 2 or 3, was {self.zero_stage}")
        if self.engine == "torch" and self.precision == "fp16":
            raise UserError(
                "precision fp16 needs loss scaling, which engine torch has not: use bf16 or engine deepspeed"
            )
        if self.optimizer == "muon" and self.engine == "deepspeed" and self.zero_stage and self.grad_clip:
            raise UserError(
                "grad_clip would clip Muon's updates instead of the gradient at zero_stage 1 to 3, where DeepSpeed "
                "measures them: use grad_clip 0, zero_stage 0 or engine torch"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a run's config.yaml."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def with_values(config: TrainConfig, values: Mapping[str, Any], source: str) -> TrainConfig:
    """`config` with `values` over it; an unknown key is an error that names the nearest known one."""
    known = {field.name: field for field in fields(TrainConfig)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys are {', '.join(known)}"
            raise UserError(f"{source}: unknown key {key!r}{hint}")
    converted = {key: _convert(key, value, getattr(config, key), source) for key, value in values.items()}
    return replace(config, **converted)


def read_config(path: str | Path, base: TrainConfig) -> TrainConfig:
    """`base` with the YAML file's values over it."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must hold `key: value` lines, was a {type(values).__name__}")
    return with_values(base, values, str(path))


def write_config(config: TrainConfig, path: str | Path) -> None:
    """The resolved config as YAML."""
    import yaml

    Path(path).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def _convert(key: str, value: Any, default: Any, source: str) -> Any:
    """`value` in the type of the key's default; YAML reads 1e-3 as a word and has no tuples."""
    try:
        if isinstance(default, tuple):
            return tuple(type(part)(item) for part, item in zip(default, value, strict=True))
        if isinstance(default, bool) or not isinstance(default, (int, float, str)):
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(default, int) and float(value) != int(float(value)):
            raise ValueError
        return int(float(value)) if isinstance(default, int) else type(default)(value)
    except (TypeError, ValueError):
        kind = f"{len(default)} numbers" if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"{source}: {key} must be {kind}, was {value!r}") from None
