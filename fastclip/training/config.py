"""What a run is: one frozen dataclass, read from a recipe, a YAML file and the command line, in this order."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastclip.errors import UserError

PER_TENSOR = ("lamb", "stableadamw")  # optimizers
Recompute = Literal["none", "selective", "full"]  # from the cheapest; all give the same gradient


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
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the training crop's width over its height."""
    hard_negatives: bool = False
    """Beside each caption one with two words or pairs of words exchanged, or one word replaced, as a further negative
    (NegCLIP, 2023)."""
    upsampling: str = ""
    """Of the sources of a mixture "a::b": how often an epoch holds each sample of each, "1::0.5"."""
    resampled: int = 0
    """Samples of an epoch drawn with replacement; 0: every sample once."""
    text_keys: str = ""
    """Captions by key, or place in its list, and weight, "txt=1::synthetic=3::captions[0]=2"; default: the JSON's
    captions, else the text."""
    image_key: str = ""
    """Column of a table that names the image files."""
    caption_key: str = ""
    """Column of a table that holds the captions."""
    fast_decode: bool = False
    """Decode JPEGs at a reduced scale: faster, some values off by one or two of 255."""
    gpu_decode: bool = False
    """Decode JPEGs on the rank's GPU, which workers only read then; needs a torchvision built for CUDA."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of brightness, contrast, saturation and hue, as in open_clip's --aug-cfg."""
    color_jitter_prob: float = 0.0
    """Share of images whose colours are jittered."""
    gray_scale_prob: float = 0.0
    """Share of images that become grey."""
    erase_prob: float = 0.0
    """Share of images that rectangles of noise are put into (random erasing, Zhong et al. 2020; --aug-cfg re_prob)."""
    erase_count: int = 1
    """The most rectangles in one of them."""
    strict: bool = False
    """The first sample that cannot be used ends the run."""
    max_broken: float = 0.5
    """Share of broken samples that ends the run with a summary."""
    workers: int = 1
    """Processes per rank that decode images."""

    model: str = "ViT-B-32"
    """Name of the model (see fastclip.models.PRESETS)."""
    image_size: int = 0
    """Height and width of images in pixels, of a model made for others; 0 takes the model's."""
    context_length: int = 0
    """Most tokens of a caption; 0 takes the model's."""
    patch_dropout: float = -1.0
    """Share of patches left out of each image while training (FLIP, Li et al. 2023); -1 takes the model's."""
    init: str = ""
    """Checkpoint to take the initial weights from; default: OpenAI's initialisation."""
    seed: int = 0
    """Of the weights and of the order of the data."""

    global_batch: int = 512
    """Pairs in one optimizer step, over all ranks: every pair sees all the others as negatives."""
    chunk_size: int = 0
    """Pairs a rank forwards at once (gradient caching: same gradient, less memory); 0 is all it has."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping it: LayerNorm, attention and activation (selective), or whole
    blocks (full); same gradient."""
    fit: bool = False
    """Where the run would not fit the memory that is free: smaller chunks, then recompute, then a higher ZeRO stage,
    by the arithmetic of `fastclip plan`; what is given here is tried first."""
    steps: int = 1000
    """Optimizer steps of the run."""
    minutes: float = 0.0
    """Ends the run after this wall-clock time, with the schedule following the clock; 0 is no limit."""

    optimizer: Literal["adamw", "lamb", "lion", "muon", "stableadamw"] = "adamw"
    """muon is for the blocks' matrices, with adamw for everything else (Jordan et al. 2024); lamb and stableadamw
    measure whole tensors and need zero_stage 0 or engine torch."""
    lr: float = 1e-3
    """Peak learning rate, of all that is not Muon's."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon's matrices."""
    betas: tuple[float, float] = (0.9, 0.98)
    """The optimizer's betas."""
    eps: float = 1e-6
    """The optimizer's epsilon."""
    weight_decay: float = 0.1
    """Of matrices; gains, biases, embeddings and the scale have none."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay_embeddings: bool = False
    """Decay embeddings too, as open_clip does."""
    schedule: Literal["cosine", "open_clip", "constant", "wsd"] = "cosine"
    """Learning rate after warm-up: down to zero along half a cosine (open_clip's begins behind the warm-up), constant,
    or constant and then down (wsd)."""
    cooldown: float = 0.2
    """Share of the run in which wsd goes down to zero."""
    image_lr: float = 0.0
    """Peak learning rate of the image tower; 0 takes `lr`."""
    text_lr: float = 0.0
    """Peak learning rate of the text tower; 0 takes `lr`."""
    image_weight_decay: float = -1.0
    """Weight decay of the image tower; -1 takes `weight_decay`."""
    text_weight_decay: float = -1.0
    """Weight decay of the text tower; -1 takes `weight_decay`."""
    image_layer_decay: float = 1.0
    """Each block of the image tower has this many times the learning rate of the one behind it."""
    text_layer_decay: float = 1.0
    """The same of the text tower."""
    lock_image: bool = False
    """Leave the image tower as it is (LiT, Zhai et al. 2022)."""
    image_unlocked: int = 0
    """Groups of a locked image tower that train nevertheless, from the last: projection, last block and norm, ..."""
    lock_text: bool = False
    """Leave the text tower as it is."""
    text_unlocked: int = 0
    """Groups of a locked text tower that train nevertheless, from the last."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    ema: float = 0.0
    """Decay a step of a moving average of the weights, 0.9999 say, kept in each checkpoint's ema/; 0: none."""
    ema_every: int = 10
    """Steps between two updates of that average: each gathers the weights."""
    contrastive_weight: float = 1.0
    """Of the contrastive loss in the sum of losses."""
    global_weight: float = 0.0
    """Of the global contrastive loss in the sum (SogCLR, Yuan et al. 2022; FastCLIP, Wei et al. 2024): all pairs of the
    data are negatives, by what earlier batches showed of each; for small batches, in place of the contrastive loss."""
    global_gamma: float = 0.2
    """The share of a batch in what is remembered of its pairs."""
    global_gamma_epochs: int = 0
    """Epochs in which that share goes down from 1 along half a cosine; FastCLIP takes half of a run's."""
    global_rho: float = 0.0
    """Above 0 the loss is FastCLIP-v3's, whose learned temperature this holds up (6.5 for CC3M); 0: its v0's."""
    sigmoid_weight: float = 0.0
    """Of the sigmoid loss (SigLIP, Zhai et al. 2023) in the sum; above 0 the model has a logit_bias."""
    caption_weight: float = 0.0
    """Of the captions' loss in the sum, a cross-entropy of next tokens; for models with a decoder (coca_ViT-B-32)."""
    distill_weight: float = 0.0
    """Of the distillation loss in the sum, from a teacher's features that lie beside each sample as
    teacher_image.npy and teacher_text.npy."""
    distill_scale: float = 100.0
    """The teacher's logit scale, exponentiated."""
    loss_impl: Literal["auto", "reference", "dense", "cpu", "triton", "cuda"] = "auto"
    """Implementation of the contrastive loss."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed (ZeRO), or torch alone with a plain all-reduce of the gradient."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the model's computation; master weights and the loss are fp32. auto is bf16, or fp32 on a device without bf16
    products (CPUs before AVX-512, where one takes 100 times as long)."""
    fp8: bool = False
    """Compute the blocks' products in fp8 (torchao; compute capability 8.9 or later)."""
    compile: bool = False
    """Run the blocks by torch.compile; the first step then takes a minute or more."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 1 partitions the optimizer state, 2 the gradients too, 3 the weights too; 0 nothing."""
    reduction: Literal["auto", "coalesced", "boundary", "unmanaged"] = "auto"
    """How DeepSpeed sums gradients over ranks: once a step from whole local gradients (coalesced; auto, where
    offered), at each chunk, which holds less at zero_stage 2 and 3 (boundary), or within its step (unmanaged)."""
    deepspeed_config: str = ""
    """DeepSpeed JSON merged over the generated one; conflicts are shown, settings known to be wrong refused."""

    max_skipped: int = 50
    """Steps in a row that may be skipped for a gradient that is not finite; one more ends the run."""
    spike: float = 0.0
    """A loss of more than this many times its median over 100 steps takes the run's weights and optimizer back to the
    last checkpoint, and on with the data behind the spike; 0: none does."""
    hang_timeout: float = 40.0
    """Seconds after which a rank that gives no sign of life, or stands still within a step, ends the run; 0: never."""

    out: str = ""
    """Run folder; default runs/<model>-<date>."""
    resume: str = ""
    """"latest", or a run or step folder, to go on from; empty starts anew."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    best: str = ""
    """Figure of an evaluation, SET/FIGURE (digits_test/top1, scenes_test/text_to_image/R@1): the weights of the step
    where it was highest are kept in best/."""
    save_every: int = 0
    """Steps between two checkpoints; 0 saves at the end only."""
    snapshot_every: int = 0
    """Steps between two snapshots, cheap ones that outlive the run's processes but not the machine's next start:
    --resume latest takes the newer of checkpoint and snapshot; 0: none."""
    keep: int = 3
    """Checkpoints to keep."""
    portable: bool = True
    """Keep the optimizer's state in them by parameter name too, so that a run can go on with another number of ranks,
    ZeRO stage or engine."""
    background_save: bool = True
    """Hash and flush them while training goes on."""
    mirror: str = ""
    """URL of a second place for them (s3://, gs://, any that fsspec writes), copied to beside training; --resume latest
    takes up its newest where `out` has none as new."""
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
        least |= {
            "eval_every": 0,
            "save_every": 0,
            "snapshot_every": 0,
            "keep": 1,
            "max_skipped": 0,
            "hang_timeout": 0,
            "grad_clip": 0,
            "lr": 0,
            "muon_lr": 0,
            "weight_decay": 0,
            "ema_every": 1,
            "global_gamma_epochs": 0,
            "global_rho": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} must be at least {low}, was {getattr(self, name)}")
        for name in ("cooldown", "image_layer_decay", "text_layer_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} must be above 0 and at most 1, was {getattr(self, name)}")
        if self.spike and self.spike <= 1:
            raise UserError(f"spike must be 0 or above 1, was {self.spike}")
        if self.spike and not self.save_every:
            raise UserError("spike goes back to a checkpoint, of which there is none before the end: set save_every")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema must be at least 0 and below 1, was {self.ema}")
        weights = (self.contrastive_weight, self.global_weight, self.sigmoid_weight, self.caption_weight)
        if not any((*weights, self.distill_weight)):
            raise UserError("the weights of all losses are 0, one must be above")
        if not 0 < self.global_gamma <= 1:
            raise UserError(f"global_gamma must be above 0 and at most 1, was {self.global_gamma}")
        if self.hard_negatives and self.sigmoid_weight:
            raise UserError("hard_negatives are texts without an image, which the sigmoid loss cannot take: leave one")
        if self.hard_negatives and self.caption_weight:
            raise UserError("hard_negatives are texts without an image, which no caption loss can take: leave one")
        if self.schedule == "open_clip" and self.minutes:
            raise UserError("schedule open_clip counts steps: use cosine with --minutes")
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"zero_stage must be 0, 1, 2 or 3, was {self.zero_stage}")
        if self.compile and self.engine == "deepspeed" and self.zero_stage == 3:
            raise UserError("compile needs whole weights, which zero_stage 3 gathers as they are used: leave one")
        if self.engine == "torch" and self.precision == "fp16":
            raise UserError(
                "precision fp16 needs loss scaling, which engine torch has not: use bf16 or engine deepspeed"
            )
        if self.optimizer in PER_TENSOR and self.engine == "deepspeed" and self.zero_stage:
            raise UserError(
                f"optimizer {self.optimizer} measures whole tensors, of which zero_stage 1 to 3 gives it flat parts: "
                "use zero_stage 0 or engine torch, or adamw or lion"
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
