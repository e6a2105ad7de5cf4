"""Training with torch alone: autocast, one all-reduce of the gradient a step, torch's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.models.clip import CLIP
from fastclip.training.config import TrainConfig
from fastclip.training.engine import DTYPES, MakeOptimizer, StepResult
from fastclip.training.optim import parameter_groups
from fastclip.training.processes import Processes


class TorchEngine:
    """fp32 weights on every rank; bf16 by autocast."""

    def __init__(
        self, model: CLIP, config: TrainConfig, processes: Processes, make_optimizer: MakeOptimizer | None = None
    ) -> None:
        self.model = model.to(processes.device)
        self.processes, self.grad_clip = processes, config.grad_clip
        self.dtype = DTYPES[config.precision]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = parameter_groups(model, config)
        self.optimizers = [make_optimizer(groups)] if make_optimizer else _optimizers(groups)
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        with torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(image, text, output_dict=True)

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def set_boundary(self, is_last: bool) -> None:
        pass

    def backward(self, surrogate: Tensor) -> None:
        surrogate.backward()

    def step(self, lr_factor: float) -> StepResult:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self.processes.world_size > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat, group=self.processes.group)
            flat /= self.processes.world_size
            gradients = [
                part.view_as(p)
                for part, p in zip(flat.split([p.numel() for p in gradients]), self.parameters, strict=True)
            ]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip or float("inf"))
        skipped = not norm.isfinite()
        if not skipped:
            for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * lr_factor
                optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        return StepResult(float(norm), bool(skipped))

    def save_state(self, directory: Path) -> None:
        if self.processes.is_first:
            state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
            torch.save(state, directory / "torch.pt")

    def load_state(self, directory: Path) -> None:
        state = torch.load(directory / "torch.pt", map_location=self.processes.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}


def _optimizers(groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
    muon: list[dict[str, Any]] = []
    adam: list[dict[str, Any]] = []
    for group in groups:
        (muon if group.pop("use_muon") else adam).append(group)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam)]
    return [*optimizers, torch.optim.Muon(muon)] if muon else optimizers
