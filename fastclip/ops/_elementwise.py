"""What the block ops share: which of their implementations runs where, and the reasons against the others."""

from __future__ import annotations

import torch

from fastclip.ops import _dispatch, _extension

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


def pick(
    op: str, impl: str, names: tuple[str, ...], order: tuple[str, ...], device_type: str, dtype: torch.dtype
) -> str:
    """The implementation to run; see `_dispatch.pick` for errors."""
    return _dispatch.pick(op, impl, names, order, lambda name: why_not(op, name, device_type, dtype))


def explain(
    op: str, names: tuple[str, ...], order: tuple[str, ...], device_type: str, dtype: torch.dtype
) -> list[_dispatch.Verdict]:
    """Which implementation "auto" takes, and why not the others."""
    return _dispatch.explain(op, names, order, lambda name: why_not(op, name, device_type, dtype))
