"""What the losses on n x m logits share: which of their implementations runs where."""

import math
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastclip.ops import _cuda, _dispatch, _extension, _tuned

IMPLS = ("reference", "dense", "cpu", "triton", "cuda")
# Up to here the launches of the chunked paths cost more than the matrix. On the CPU (2 cores, fp32 and bf16, D = 128
# and 512, N = 64 to 4096) "cpu" was never behind "dense", nor "dense" behind "reference" up to N = 1024. On an H200
# "cuda" was never behind "dense" (N = 256 to 8192). What a GPU has measured beside each other goes before this.
DENSE_UP_TO = 1 << 20


@dataclass(frozen=True)
class PairOp:
    """A loss op: `name`, which is its folder too, and how many logits its dense implementation may hold at once."""

    name: str
    dense_limit: int

    def measured(self, device_type: str, dtype: torch.dtype, n: int, m: int, d: int) -> _tuned.Choice | None:
        """What this GPU has measured for n x m logits of features of d dimensions."""
        return _tuned.find(self.name, device_type, dtype, math.isqrt(n * m), f"{d} dimensions")

    def order(self, device_type: str, n: int, m: int) -> tuple[str, ...]:
        """What "auto" tries, best first, for n x m logits, where nothing is measured."""
        if device_type == "cpu":
            return ("cpu", "dense", "reference") if n * m <= DENSE_UP_TO else ("cpu", "reference")
        return ("cuda", "dense", "triton", "reference") if n * m <= DENSE_UP_TO else ("cuda", "triton", "reference")

    def why_not(self, impl: str, device_type: str, dtype: torch.dtype, n: int, m: int) -> str | None:
        """The reason `impl` cannot run on such tensors, or None."""
        if impl == "dense" and n * m > self.dense_limit:
            return f"{n} x {m} logits are more than the {self.dense_limit} it may hold at once"
        if impl == "cpu":
            if device_type != "cpu":
                return f"the features are on {device_type}"
            if dtype not in (torch.float32, torch.bfloat16):
                return f"it takes float32 and bfloat16, not {dtype}"
            return _extension.load()
        if impl == "cuda":
            if dtype not in (torch.bfloat16, torch.float16):
                return f"it takes bfloat16 and float16, not {dtype}"
            if not _dispatch.has_package("triton"):
                return "the package triton, whose kernels it takes for groups, is not installed"
            return _cuda.why_not(device_type)
        if impl == "triton":
            if not _dispatch.has_package("triton"):
                return "the package triton is not installed"
            if dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return f"it takes float32, bfloat16 and float16, not {dtype}"
            if device_type != "cuda" and not _kernels(self.name, "triton").INTERPRETED:
                off_gpu = "off the GPU it runs in the interpreter only (TRITON_INTERPRET=1)"
                return f"the features are on {device_type}: {off_gpu}"
        return None

    def implementation(self, impl: str, image_features: Tensor, text_features: Tensor) -> ModuleType:
        """The module that runs on these tensors; see `_dispatch.pick` for errors."""
        kind, dtype = image_features.device.type, image_features.dtype
        (n, d), m = image_features.shape, text_features.shape[0]
        order = _tuned.order(self.measured(kind, dtype, n, m, d), self.order(kind, n, m))
        name = _dispatch.pick(self.name, impl, IMPLS, order, lambda name: self.why_not(name, kind, dtype, n, m))
        return _kernels(self.name, name)

    def explain(
        self, device_type: str, dtype: torch.dtype, n: int, m: int | None = None, d: int = 512
    ) -> list[_dispatch.Verdict]:
        """Which implementation "auto" takes for n x m pairs (m = n by default), why, and why not the others."""
        m = n if m is None else m
        choice = self.measured(device_type, dtype, n, m, d)
        order, because = _tuned.order(choice, self.order(device_type, n, m)), _tuned.because(choice, device_type)
        reason = partial(self.why_not, device_type=device_type, dtype=dtype, n=n, m=m)
        return _dispatch.explain(self.name, IMPLS, order, reason, because)


@cache
def _kernels(op: str, impl: str) -> ModuleType:
    return import_module(f"fastclip.ops.{op}.{impl}")
