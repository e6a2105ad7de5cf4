"""CLIP under DeepSpeed ZeRO 0 to 3, with the gradient of a step made of many backwards exactly once.

Three settings make it exact (measured; the tests hold them): the surrogates are not divided by an accumulation count
(`scale_wrt_gas=False`), gradients are reduced once a step (`coalesce_grad_reduction`, or the boundary flag where that is
not offered: without either ZeRO 1 and 2 silently drop all backwards but one), and `gradient_clipping` is explicit.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.models.clip import CLIP
from fastclip.training.config import TrainConfig
from fastclip.training.engine import DTYPES, StepResult
from fastclip.training.optim import parameter_groups
from fastclip.training.processes import Processes

_TAG = "engine"


class DeepSpeedEngine:
    """See `fastclip.training.engine.Engine`."""

    def __init__(self, model: CLIP, config: TrainConfig, processes: Processes, ds_config: dict[str, Any]) -> None:
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed(dist_init_required=False)
        self.processes, self.dtype = processes, DTYPES[config.precision]
        optimizer = _optimizer(parameter_groups(model, config), processes)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self.names = {p: name for name, p in self.engine.module.named_parameters()}
        self.param_groups = self.engine.optimizer.param_groups
        self.peaks = [group["lr"] for group in self.param_groups]
        # One reduction a step where DeepSpeed offers it; else it reduces at each chunk and is told which is the last.
        self.coalesces = self.engine.zero_optimization_stage() > 0 and hasattr(
            self.engine.optimizer, "_coalesce_grad_reduction"
        )
        self._reduction = ExitStack()
        self._is_open = self._is_last = False

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        return self.engine(image, text, output_dict=True)

    def train(self, mode: bool) -> None:
        self.engine.train(mode)

    def set_boundary(self, is_last: bool) -> None:
        self._is_last = is_last
        if not self.coalesces:
            self.engine.set_gradient_accumulation_boundary(is_last)
        elif not self._is_open:
            self._reduction.enter_context(self.engine.coalesce_grad_reduction())
            self._is_open = True

    def backward(self, surrogate: Tensor) -> None:
        self.engine.backward(surrogate, scale_wrt_gas=False)
        if self._is_last and self._is_open:
            self._is_open = False
            self._reduction.close()

    def step(self, lr_factor: float) -> StepResult:
        for group, peak in zip(self.param_groups, self.peaks, strict=True):
            group["lr"] = peak * lr_factor
        # DeepSpeed compiles Muon's small matrix loop; on the CPU the compiler costs more than it can ever save.
        eager = torch.compiler.set_stance("force_eager") if self.processes.device.type == "cpu" else nullcontext()
        with eager:
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        skipped = not self.engine.was_step_applied()
        return StepResult(float("nan") if norm is None else float(norm), skipped)

    def save_state(self, directory: Path) -> None:
        self.engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)

    def load_state(self, directory: Path) -> None:
        # DeepSpeed's own optimizer shards are pickles: resume only runs you trust.
        self.engine.load_checkpoint(str(directory), tag=_TAG)

    def full_state_dict(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        partitioned = self.engine.zero_optimization_stage() > 0 or self.dtype != torch.float32
        state = {}
        for parameter, name in self.names.items():
            value = safe_get_full_fp32_param(parameter) if partitioned else None
            state[name] = (parameter if value is None else value).detach().float().cpu().clone()
        kept = self.engine.module.state_dict()
        buffers = (name for name, _ in self.engine.module.named_buffers() if name in kept)
        return state | {name: kept[name].cpu().clone() for name in buffers}


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet: its banner and its warnings about absent GPUs are noise on a CPU."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _optimizer(groups: list[dict[str, Any]], processes: Processes) -> torch.optim.Optimizer:
    """torch's AdamW, or DeepSpeed's Muon, which ZeRO hands whole matrices where torch's would see flat partitions."""
    if not any(group["use_muon"] for group in groups):
        return torch.optim.AdamW([{k: v for k, v in group.items() if k != "use_muon"} for group in groups])
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    # "gram" computes in fp16, which CPUs emulate.
    method = "standard" if processes.device.type == "cpu" else "gram"
    return MuonWithAuxAdam([group | {"ns_method": method} if group["use_muon"] else group for group in groups])
