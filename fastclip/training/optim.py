"""Which parameter is trained, and how: its tower, its place in it, its group of the optimizer."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastclip.errors import UserError
from fastclip.training.config import TrainConfig

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers?|layer)\.?(\d+)\.")
_FIRST = re.compile(
    r"conv1|conv2|conv3|conv_stem|bn1|bn2|bn3|class_embedding|embed|cls_token|ln_pre|norm_pre|^visual\.downsample"
)
_LAST = re.compile(r"(?:^|\.)(?:proj|text_projection|attnpool\.[a-z_]*|head)(?:\.|$)")
SHARED = ("logit_scale", "logit_bias", "text_decoder")


def tower_of(name: str) -> str:
    """ "image", "text", or "" for what both share."""
    return "" if name.partition(".")[0] in SHARED else "image" if name.startswith("visual.") else "text"


def depths(names: list[str]) -> dict[str, int]:
    """Of one tower's parameters: 0 for what turns the input into tokens, 1 .. L for its L blocks (the last with the
    norm behind it), L + 1 for the projection. These are the groups that open_clip unlocks, from the last one on."""
    blocks = {name: int(found[1]) for name in names if (found := _BLOCK.search(name))}
    # A ModifiedResNet counts its layers from 1, and has blocks within them.
    first = min(blocks.values(), default=0)
    count = max(blocks.values(), default=first - 1) - first + 1

    def depth(name: str) -> int:
        if name in blocks:
            return blocks[name] - first + 1
        if _LAST.search(name):
            return count + 1
        return 0 if _FIRST.search(name) else count

    return {name: depth(name) for name in names}


def lock_towers(model: nn.Module, config: TrainConfig) -> None:
    """Takes the locked towers' parameters out of training (LiT, Zhai et al. 2022), but for their last groups."""
    for tower, is_locked, unlocked in (
        ("image", config.lock_image, config.image_unlocked),
        ("text", config.lock_text, config.text_unlocked),
    ):
        parameters = {name: p for name, p in model.named_parameters() if tower_of(name) == tower}
        if is_locked:
            depth = depths(list(parameters))
            groups = max(depth.values()) + 1
            if unlocked > groups:
                raise UserError(f"{tower}_unlocked must be at most {groups}, the groups of the tower, was {unlocked}")
            for name, parameter in parameters.items():
                parameter.requires_grad_(depth[name] >= groups - unlocked)


def set_training(model: nn.Module, mode: bool) -> None:
    """`model.train(mode)`, but that locked batch norm goes by its running statistics, as when it was trained."""
    model.train(mode)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer, with "muon" also the matrices of the transformer blocks for Muon.

    Gains, biases, embeddings and the scale (fewer than two dimensions, or "embedding" in the name) have no weight
    decay, embeddings by choice. A tower's rate is its own or `lr`, times its layer decay to the power of the groups
    behind it (`depths`). Each parameter is tagged with `use_muon`, which is where DeepSpeed's ZeRO looks for it.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    factors = _rate_factors([name for name, _ in model.named_parameters()], config)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for kind in ("decayed", "plain", "muon"):
        for name, parameter in named:
            if _kind(name, parameter, config) != kind:
                continue
            parameter.use_muon = kind == "muon"  # type: ignore[attr-defined]
            decay = _weight_decay(tower_of(name), config) if kind == "decayed" else 0.0
            key = (kind, decay, factors[name])
            if key not in groups:
                groups[key] = _group(kind, decay, factors[name], config)
            groups[key]["params"].append(parameter)
    return list(groups.values())


def _kind(name: str, parameter: nn.Parameter, config: TrainConfig) -> str:
    if parameter.ndim < 2 or ("embedding" in name and not config.decay_embeddings):
        return "plain"
    is_muons = config.optimizer == "muon" and parameter.ndim == 2 and "resblocks" in name
    return "muon" if is_muons else "decayed"


def _group(kind: str, decay: float, factor: float, config: TrainConfig) -> dict[str, Any]:
    rate: dict[str, Any] = {"lr": config.lr * factor, "betas": tuple(config.betas), "eps": config.eps}
    if kind == "muon":
        rate = {"lr": config.muon_lr * factor, "momentum": 0.95}
    return {"params": [], "weight_decay": decay, **rate, "use_muon": kind == "muon"}


def _weight_decay(tower: str, config: TrainConfig) -> float:
    own = {"image": config.image_weight_decay, "text": config.text_weight_decay}.get(tower, -1.0)
    return config.weight_decay if own < 0 else own


def _rate_factors(names: list[str], config: TrainConfig) -> dict[str, float]:
    """The rate of each parameter as a share of the run's."""
    factors = dict.fromkeys(names, 1.0)
    for tower, lr, decay in (
        ("image", config.image_lr, config.image_layer_decay),
        ("text", config.text_lr, config.text_layer_decay),
    ):
        depth = depths([name for name in names if tower_of(name) == tower])
        for name, place in depth.items():
            factors[name] = (lr / config.lr if lr else 1.0) * decay ** (max(depth.values()) - place)
    return factors
