"""What the loop needs of an engine, and the choice between DeepSpeed and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastclip.models.clip import CLIP
from fastclip.training.config import TrainConfig
from fastclip.training.processes import Processes

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def computes_in_bf16(device: torch.device) -> bool:
    """Whether it has products of bf16, rather than a way to make the same numbers slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class StepResult(NamedTuple):
    """What became of one optimizer step."""

    grad_norm: float  # before clipping; inf or nan in a skipped step
    skipped: bool  # the gradient was not finite on some rank, so no rank changed its weights


class Engine(Protocol):
    """A model under an optimizer: many backwards, one reduction over the ranks, one step."""

    dtype: torch.dtype
    reduction: str  # how gradients are summed over the ranks, in a word

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        """CLIP.forward(image, text, output_dict=True) through whatever wraps the model."""

    def train(self, mode: bool) -> None: ...

    def set_boundary(self, is_last: bool) -> None:
        """Before each backward: whether it is the step's last."""

    def backward(self, surrogate: Tensor) -> None:
        """Accumulates the gradient of a scalar, undivided."""

    def step(self, lr_factor: float) -> StepResult:
        """Averages the gradient over the ranks and updates the weights, with this share of the peak learning rates."""

    def save_state(self, directory: Path, write: Callable[..., None] = torch.save) -> None:
        """Everything that a bit-equal continuation needs, by write(state, path); called on every rank."""

    def load_state(self, directory: Path, read: Callable[..., Any] = torch.load) -> None:
        """What `save_state` wrote, by read(path, ...), which takes torch.load's options."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the optimizer holds, whole and in fp32, by "key/parameter" ("exp_avg/visual.proj"), and its "step".

        On the CPU of the first rank; called on every rank.
        """

    def load_portable(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """What `full_state_dict` and `optimizer_state` gave, in place of `load_state`; the model was made with the
        same weights. Called on every rank, each with all of it."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """The fp32 weights on the CPU, whole, on the first rank; called on every rank."""


def build_engine(
    model: CLIP,
    config: TrainConfig,
    processes: Processes,
    ds_config: dict[str, Any] | None,
    make_optimizer: MakeOptimizer | None = None,
) -> Engine:
    """The engine of `config`; `ds_config` is DeepSpeed's, None for engine "torch".

    make_optimizer: makes the optimizer of `parameter_groups`, in place of the one that the config names.
    """
    if ds_config is None:
        from fastclip.training.torch_engine import TorchEngine

        return TorchEngine(model, config, processes, make_optimizer)
    from fastclip.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config, processes, ds_config, make_optimizer)
