"""Which implementation of attention runs where: what "auto" tries, and the reasons against the others."""

from __future__ import annotations

import torch

from fastclip.ops import _dispatch, _extension

IMPLS = ("reference", "sdpa", "cpu", "triton", "xformers", "flash_attn")
# On the CPU (2 cores), tokens up to which the C++ kernel's forward and backward beat SDPA's, packed or in bf16; dense
# sequences in fp32 go to SDPA (benchmarks/results/cpu.csv).
SHORT = 256
# On CUDA, the tokens between which Triton's kernels are taken for dense 16-bit heads of 64 dimensions: an H200 has
# measured 77 causal, 197 and 257 in bfloat16 (docs/performance.md: 2.4 to 3.1 times as fast as the best of SDPA's,
# forward and backward), and the lengths between are taken to be like them. Other heads, packed captions, fewer or more
# tokens are not measured and go to SDPA.
MEASURED_ON_CUDA = (65, 257)
LARGEST_HEAD = {"triton": 128, "flash_attn": 256, "xformers": 256}
TAKES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "xformers": (torch.float32, torch.bfloat16, torch.float16),
    "flash_attn": (torch.bfloat16, torch.float16),
}


def order(device_type: str, dtype: torch.dtype, length: int, head_dim: int, is_packed: bool) -> tuple[str, ...]:
    """What "auto" tries, best first."""
    if device_type == "cuda":
        first, last = MEASURED_ON_CUDA
        is_measured = first <= length <= last and head_dim == 64 and not is_packed
        return ("triton", "sdpa") if is_measured and dtype in (torch.bfloat16, torch.float16) else ("sdpa",)
    is_ours = device_type == "cpu" and length <= SHORT and (is_packed or dtype == torch.bfloat16)
    return ("cpu", "sdpa") if is_ours else ("sdpa",)


def why_not(impl: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason `impl` cannot run on such tensors, or None."""
    if dtype not in TAKES.get(impl, (dtype,)):
        *names, last = (str(x).removeprefix("torch.") for x in TAKES[impl])
        return f"it takes {', '.join(names)} and {last}, not {dtype}"
    if head_dim > LARGEST_HEAD.get(impl, head_dim):
        return f"it takes heads of up to {LARGEST_HEAD[impl]} dimensions, not {head_dim}"
    if impl == "xformers" and head_dim % 8:
        return f"it takes heads of a multiple of 8 dimensions, not {head_dim}"
    return _is_missing(impl, device_type)


def _is_missing(impl: str, device_type: str) -> str | None:
    if impl == "cpu":
        return _extension.load() if device_type == "cpu" else f"the tensors are on {device_type}"
    if impl in ("triton", "xformers", "flash_attn") and not _dispatch.has_package(impl):
        return f"the package {impl} is not installed"
    if impl in ("xformers", "flash_attn") and device_type != "cuda":
        return f"the tensors are on {device_type}: it runs on CUDA devices only"
    if impl == "triton" and device_type != "cuda":
        from fastclip.ops.attention import triton

        if not triton.INTERPRETED:
            return f"the tensors are on {device_type}: off the GPU it runs in the interpreter only (TRITON_INTERPRET=1)"
    return None


# What torch.compiler.assume_constant_result sets: torch.compile asks once and does not trace the libraries' loading.
# Set by hand because that function imports Dynamo (0.8 s), and importing fastclip must not.
_is_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def pick(impl: str, device_type: str, dtype: torch.dtype, length: int, head_dim: int, is_packed: bool) -> str:
    """The implementation to run; see `_dispatch.pick` for errors."""
    tried = order(device_type, dtype, length, head_dim, is_packed)
    return _dispatch.pick("attention", impl, IMPLS, tried, lambda name: why_not(name, device_type, dtype, head_dim))


def explain(
    device_type: str, dtype: torch.dtype, length: int, head_dim: int = 64, is_packed: bool = False
) -> list[_dispatch.Verdict]:
    """Which implementation "auto" takes for sequences of up to `length` tokens, and why not the others."""
    tried = order(device_type, dtype, length, head_dim, is_packed)
    return _dispatch.explain("attention", IMPLS, tried, lambda name: why_not(name, device_type, dtype, head_dim))
