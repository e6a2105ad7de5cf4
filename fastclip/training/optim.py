"""Which parameter is optimized how."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastclip.training.config import TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for AdamW and, with optimizer "muon", the matrices of the transformer blocks for Muon.

    Gains, biases, embeddings and the scale (fewer than two dimensions, or "embedding" in the name) have no weight
    decay. Each parameter is tagged with `use_muon`, which is where DeepSpeed's ZeRO looks for it.
    """
    muon, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.use_muon = False  # type: ignore[attr-defined]
        if parameter.ndim < 2 or "embedding" in name:
            plain.append(parameter)
        elif config.optimizer == "muon" and parameter.ndim == 2 and "resblocks" in name:
            parameter.use_muon = True  # type: ignore[attr-defined]
            muon.append(parameter)
        else:
            decayed.append(parameter)
    adam = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "use_muon": False}
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay, **adam},
        {"params": plain, "weight_decay": 0.0, **adam},
    ]
    if muon:
        groups.append({"params": muon, "lr": config.muon_lr, "momentum": 0.95, "weight_decay": 0.0, "use_muon": True})
    return [group for group in groups if group["params"]]
