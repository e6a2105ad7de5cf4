"""CLIP under DeepSpeed ZeRO 0 to 3, with the gradient of a step made of many backwards exactly once.

Three settings make it exact (measured; the tests hold them): the surrogates are not divided by an accumulation count
(`scale_wrt_gas=False`), gradients are reduced once a step (`coalesce_grad_reduction`, or the boundary flag where that
is not offered: without either ZeRO 1 and 2 silently drop all backwards but one), `gradient_clipping` is explicit.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fastclip.errors import UserError
from fastclip.grad_cache import statistics_held
from fastclip.models.clip import CLIP
from fastclip.training.config import TrainConfig
from fastclip.training.engine import DTYPES, MakeOptimizer, StepResult
from fastclip.training.optim import lock_towers, parameter_groups, set_training
from fastclip.training.optimizers import OPTIMIZERS
from fastclip.training.processes import Processes
from fastclip.training.zero_state import ZeroState

_TAG = "engine"
_UNFINISHED = "the step before failed half-way, its gradient is incomplete: go on from a checkpoint"


class DeepSpeedEngine:
    """See `fastclip.training.engine.Engine`."""

    def __init__(
        self,
        model: CLIP,
        config: TrainConfig,
        processes: Processes,
        ds_config: dict[str, Any],
        make_optimizer: MakeOptimizer | None = None,
    ) -> None:
        deepspeed = _import_deepspeed()
        _check_precision(config.precision, deepspeed.accelerator.get_accelerator())
        deepspeed.init_distributed(dist_init_required=False)
        _check_config(ds_config, config.deepspeed_config)
        self.processes, self.dtype = processes, DTYPES[config.precision]
        lock_towers(model, config)
        groups = parameter_groups(model, config)
        self.has_muon = not make_optimizer and any(group["use_muon"] for group in groups)
        if processes.device.type == "cpu":
            _import_muon_without_compiler()
        optimizer = make_optimizer(groups) if make_optimizer else _optimizer(groups, config.optimizer, processes)
        if config.zero_stage == 3:
            _partition(model, ds_config, self.dtype, processes)
        with self._muon_settings():
            self.engine, _, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
            )
        self.names = {p: name for name, p in self.engine.module.named_parameters()}
        self.peaks = [group["lr"] for group in self.engine.optimizer.param_groups]
        self.state = ZeroState(self.engine, self.names)
        self.reduction = self._reduction_path(config)
        self._coalescing = ExitStack()
        self._is_open = self._is_last = False
        self._undo_empty_step()

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        if self._is_open and not torch.is_grad_enabled():  # a step begins with the forwards that keep no graph
            raise RuntimeError(_UNFINISHED)
        held = nullcontext() if torch.is_grad_enabled() else statistics_held(self.engine.module)
        with held, self._weights_let_go():
            return self.engine(image, text, output_dict=True)

    def train(self, mode: bool) -> None:
        set_training(self.engine, mode)

    def set_boundary(self, is_last: bool) -> None:
        if self._is_open and self._is_last:
            raise RuntimeError(_UNFINISHED)
        if self.reduction == "boundary":
            self.engine.set_gradient_accumulation_boundary(is_last)
        elif self.reduction == "coalesced" and not self._is_open:
            self._coalescing.enter_context(self.engine.coalesce_grad_reduction())
        self._is_open, self._is_last = True, is_last

    def backward(self, surrogate: Tensor) -> None:
        with self._weights_let_go():  # which recomputation forwards again
            self.engine.backward(surrogate, scale_wrt_gas=False)
        if self._is_last:
            with self._muon_settings():
                self._coalescing.close()
            self._is_open = False

    def step(self, lr_factor: float) -> StepResult:
        for group, peak in zip(self.engine.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * lr_factor
        norm = self._norm() if self.state.is_bare else None  # else nobody looks at it before it is applied
        if norm is not None and not norm.isfinite():
            self.engine.zero_grad()
            return StepResult(float(norm), True)
        with self._muon_settings():
            self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return StepResult(float("nan") if norm is None else float(norm), not self.engine.was_step_applied())

    def save_state(self, directory: Path, write: Callable[..., None] = torch.save) -> None:
        # Ranks wait for each other within: one that cannot write says so afterwards.
        failures = []

        def save(state_dict: Any, path: str) -> None:
            try:
                write(state_dict, path)
            except (OSError, RuntimeError) as failure:
                failures.append(failure)

        skip_script = patch.object(self.engine, "_copy_recovery_script", lambda *_: None)  # which no one needs here
        with patch.object(self.engine.checkpoint_engine, "save", save), skip_script:
            self.engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)
        if failures:
            raise failures[0]

    def load_state(self, directory: Path, read: Callable[..., Any] = torch.load) -> None:
        # DeepSpeed's own optimizer shards are pickles: resume only runs you trust.
        def load(path: str, map_location: Any = None) -> Any:
            return read(path, map_location=map_location, weights_only=False)

        with patch.object(self.engine.checkpoint_engine, "load", load):
            loaded, _ = self.engine.load_checkpoint(str(directory), tag=_TAG)
        if loaded is None:
            raise UserError(f"checkpoint {directory.parent} holds no state of a DeepSpeed engine")

    def full_state_dict(self) -> dict[str, Tensor]:
        is_first, state = self.processes.is_first, {}
        for parameter, name in self.names.items():
            value = self.state.weight(parameter)
            if is_first:
                state[name] = value.cpu().clone()
        kept = self.engine.module.state_dict()
        buffers = (name for name, _ in self.engine.module.named_buffers() if name in kept)
        return state | {name: kept[name].cpu().clone() for name in buffers} if is_first else {}

    def optimizer_state(self) -> dict[str, Tensor]:
        is_first = self.processes.is_first
        return {name: value.cpu().clone() for name, value in self.state.moments() if is_first}

    def load_portable(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        with self._muon_settings():
            self.state.put(weights, moments)

    def _reduction_path(self, config: TrainConfig) -> str:
        """The one that the config names, or the best that this DeepSpeed and this stage offer."""
        offered = {
            "coalesced": hasattr(self.engine.optimizer, "_coalesce_grad_reduction"),
            "boundary": True,
            # An older DeepSpeed ignores its key; a bare optimizer's gradient is looked at before the step.
            "unmanaged": hasattr(self.engine, "managed_gradient_accumulation") and not self.state.is_bare,
        }
        if config.reduction == "auto":
            return "coalesced" if offered["coalesced"] else "boundary"
        if not offered[config.reduction]:
            raise UserError(
                f"reduction {config.reduction} is not offered by this DeepSpeed at zero_stage {config.zero_stage} in "
                f"{config.precision}: use auto, {', '.join(name for name, is_there in offered.items() if is_there)}"
            )
        return config.reduction

    def _undo_empty_step(self) -> None:
        """ZeRO-0 in bf16 or fp16 has taken a step of zero gradient to make the optimizer's state.

        Left as it is, Adam's bias correction is one step ahead: the first update comes out a quarter too small.
        """
        if not self.state.is_bare and self.state.stage == 0:
            self.state.optimizer.state.clear()
            for half, master in self.state.masters.items():
                master.data.copy_(half)

    def _norm(self) -> Tensor:
        """Of the gradient, which every rank has whole and reduced by now."""
        gradients = [p.grad for p in self.names if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @contextmanager
    def _weights_let_go(self) -> Iterator[None]:
        """Under ZeRO-3 an F.linear of the same bits that does not hold a gathered weight until the backward.

        Left to itself (`memory_efficient_linear`) DeepSpeed puts one in place for every model of the process, for good,
        and rounds a bf16 product before it adds the bias: updates differ by 7 % from the other stages'.
        """
        if self.state.stage == 3:
            with patch.object(torch.nn.functional, "linear", _zero3_linear()):
                yield
        else:
            yield

    @contextmanager
    def _muon_settings(self) -> Iterator[None]:
        """How DeepSpeed's Muon orthogonalises matrices, within the reduction or the step.

        On the CPU without the compiler, which costs more there than it can ever save. In an fp32 run in fp32: in bf16
        or fp16, DeepSpeed's choice, a difference in a gradient's last bit is one of 3e-5 in the loss 8 steps later.
        """
        with ExitStack() as settings:
            if self.processes.device.type == "cpu" and "torch._dynamo" in sys.modules:  # else nothing can be compiled
                settings.enter_context(torch.compiler.set_stance("force_eager"))
            if self.has_muon and self.dtype == torch.float32:
                dtype = "deepspeed.runtime.zero.muon.original_muon.ns_compute_dtype"
                settings.enter_context(patch(dtype, lambda method: torch.float32))
            yield


def _partition(model: CLIP, ds_config: dict[str, Any], dtype: torch.dtype, processes: Processes) -> None:
    """Leaves each rank its part of the first rank's weights, one parameter after another.

    The others have a weight whole (see `model_without_memory`) for that long only; left to itself DeepSpeed first
    brings the whole model to every device.
    """
    from deepspeed.runtime.zero import Init

    first, *others = model.parameters()
    with torch.no_grad():
        for p in (first, *others):
            p.data = p.data.to(dtype) if processes.is_first else torch.empty(p.shape, dtype=dtype)
            if p is first:
                Init(module=nn.ParameterList([first]), config_dict_or_path=ds_config)
            else:
                first.convert_to_zero_parameters(param_list=[p])  # type: ignore[attr-defined]
        for buffer in model.buffers():
            buffer.data = buffer.data.to(processes.device)
            torch.distributed.broadcast(buffer, 0)


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet: its banner and its warnings about absent GPUs are noise on a CPU."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its own all-reduce through shared memory would be compiled at the first start (40 s and a compiler), and a rank
    # that waits in it never learns that another has died; gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@cache
def _zero3_linear() -> Callable[..., Tensor]:
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    class Linear(LinearFunctionForZeroStage3):
        @staticmethod
        def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return torch._C._nn.linear(x, weight, bias)

    return lambda x, weight, bias=None: Linear.apply(x, weight, bias)


def _check_precision(precision: str, accelerator: Any) -> None:
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not supported[precision]:
        can = ", ".join(name for name, works in supported.items() if works)
        raise UserError(
            f"precision {precision} is not supported on this device ({accelerator.device_name()}): use {can}"
        )


def _check_config(ds_config: dict[str, Any], file: str) -> None:
    """What DeepSpeed itself refuses of its JSON, which only the user's file can have brought in."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedConfig(copy.deepcopy(ds_config))
    except (ValueError, AssertionError) as error:
        found: list[Any] = (
            error.errors() if hasattr(error, "errors") else [{"loc": (), "msg": str(error)}]
        )  # pydantic's
        lines = []
        for one in found:
            key = ".".join(map(str, one["loc"]))
            near = difflib.get_close_matches(key, DeepSpeedZeroConfig.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near and near[0] != key else ""
            lines.append(f"{key}: {one['msg']}{hint}" if key else one["msg"])
        raise UserError(f"deepspeed_config {file} is refused by DeepSpeed: {'; '.join(lines)}") from error


def _import_muon_without_compiler() -> None:
    """ZeRO imports Muon under any optimizer, to ask whether it knows that one, and Muon the compiler: two seconds of a
    run's start, for what is never compiled on a CPU."""
    with patch("deepspeed.runtime.compiler.compile", lambda *_, **__: lambda f: f):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def _optimizer(groups: list[dict[str, Any]], name: str, processes: Processes) -> torch.optim.Optimizer:
    """torch's or ours, or DeepSpeed's Muon, which ZeRO hands whole matrices where torch's would see flat partitions."""
    if not any(group["use_muon"] for group in groups):
        kind = OPTIMIZERS.get(name, torch.optim.AdamW)
        return kind([{key: value for key, value in group.items() if key != "use_muon"} for group in groups])
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    method = "standard" if processes.device.type == "cpu" else "gram"  # which computes in fp16, and CPUs emulate that
    return MuonWithAuxAdam([group | {"ns_method": method} if group["use_muon"] else group for group in groups])
