"""What the block ops share: which of their implementations runs where, and the reasons against the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastclip.ops import _dispatch, _extension, _tuned

LARGE = 197 * 1024 * 768  # numbers: the blocks of a ViT-B/16 at 1,024 images
TAKES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "apex": (torch.float32, torch.bfloat16, torch.float16),
}


def why_not(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason `impl` of `op` cannot run on such tensors, or None."""
    if dtype not in TAKES.get(impl, (dtype,)):
        *names, last = (str(x).removeprefix("torch.") for x in TAKES[impl])
        return f"it takes {', '.join(names)} and {last}, not {dtype}"
    return _is_missing(op, impl, device_type)


def _is_missing(op: str, impl: str, device_type: str) -> str | None:
    if impl == "cpu":
        return _extension.load() if device_type == "cpu" else f"the tensors are on {device_type}"
    if impl in ("triton", "apex") and not _dispatch.has_package(impl):
        return f"the package {impl} is not installed"
    if impl == "apex" and device_type != "cuda":
        return f"the tensors are on {device_type}: it runs on CUDA devices only"
    if impl == "triton" and device_type != "cuda":
        from importlib import import_module

        if not import_module(f"fastclip.ops.{op}.triton").INTERPRETED:
            return f"the tensors are on {device_type}: off the GPU it runs in the interpreter only (TRITON_INTERPRET=1)"
    return None


# See fastclip.ops.attention.implementations: torch.compile asks once and does not trace the libraries' loading.
_is_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ElementwiseOp:
    """A block op: `name`, which is its folder too, and the names of its implementations."""

    name: str
    impls: tuple[str, ...]

    def pick(self, impl: str, order: tuple[str, ...], x: Tensor, kind: str) -> str:
        """The implementation to run; see `_dispatch.pick` for errors.

        Args:
            order: what "auto" tries, best first, where nothing is measured.
            kind: of input, in the words of `tuned.json`.
        """
        device_type, dtype = x.device.type, x.dtype
        tried = _tuned.order(_tuned.find(self.name, device_type, dtype, x.numel(), kind), order)
        return _dispatch.pick(
            self.name, impl, self.impls, tried, lambda name: why_not(self.name, name, device_type, dtype)
        )

    def explain(
        self, order: tuple[str, ...], device_type: str, dtype: torch.dtype, kind: str
    ) -> list[_dispatch.Verdict]:
        """Which implementation "auto" takes for a large input, why, and why not the others."""
        choice = _tuned.find(self.name, device_type, dtype, LARGE, kind)
        tried, because = _tuned.order(choice, order), _tuned.because(choice, device_type)
        reason = partial(why_not, self.name, device_type=device_type, dtype=dtype)
        return _dispatch.explain(self.name, self.impls, tried, reason, because)
