"""Training with torch alone: autocast, one all-reduce of the gradient a step, torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.grad_cache import statistics_held
from fastclip.models.clip import CLIP
from fastclip.training.config import TrainConfig
from fastclip.training.engine import DTYPES, MakeOptimizer, StepResult
from fastclip.training.optim import lock_towers, parameter_groups, set_training
from fastclip.training.optimizers import OPTIMIZERS
from fastclip.training.processes import Processes
from fastclip.training.zero_state import STEP


class TorchEngine:
    """fp32 weights on every rank; bf16 by autocast."""

    def __init__(
        self, model: CLIP, config: TrainConfig, processes: Processes, make_optimizer: MakeOptimizer | None = None
    ) -> None:
        lock_towers(model, config)
        self.model = model.to(processes.device)
        self.processes, self.grad_clip = processes, config.grad_clip
        self.dtype, self.reduction = DTYPES[config.precision], "one all-reduce"
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = parameter_groups(model, config)
        self.optimizers = [make_optimizer(groups)] if make_optimizer else _optimizers(groups, config.optimizer)
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        held = nullcontext() if torch.is_grad_enabled() else statistics_held(self.model)
        with held, torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(image, text, output_dict=True)

    def train(self, mode: bool) -> None:
        set_training(self.model, mode)

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

    def save_state(self, directory: Path, write: Callable[..., None] = torch.save) -> None:
        if self.processes.is_first:
            state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
            write(state, directory / "torch.pt")

    def load_state(self, directory: Path, read: Callable[..., Any] = torch.load) -> None:
        state = read(directory / "torch.pt", map_location=self.processes.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def optimizer_state(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        moments: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    name = STEP if key == STEP else f"{key}/{names[parameter]}"
                    moments[name] = torch.as_tensor(value).detach().cpu().float().clone()
        return moments

    def load_portable(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(dict(weights))
        names = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        places = {parameter: optimizer for optimizer in self.optimizers for parameter in _parameters_of(optimizer)}
        for entry, value in moments.items():
            key, _, name = entry.partition("/")
            if name in names:
                parameter = names[name]
                state = places[parameter].state[parameter]
                state[key] = value.to(parameter.device).view_as(parameter).clone()
                if STEP in moments and not isinstance(places[parameter], torch.optim.Muon):
                    state[STEP] = moments[STEP].float().reshape(()).clone()

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizers(groups: list[dict[str, Any]], name: str) -> list[torch.optim.Optimizer]:
    muon: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in groups:
        (muon if group.pop("use_muon") else rest).append(group)
    optimizers = [OPTIMIZERS.get(name, torch.optim.AdamW)(rest)] if rest else []
    return [*optimizers, torch.optim.Muon(muon)] if muon else optimizers
