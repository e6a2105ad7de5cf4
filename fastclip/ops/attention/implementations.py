"""Which implementation of attention runs where: what "auto" tries, and the reasons against the others."""

from __future__ import annotations

from functools import partial

import torch

from fastclip.ops import _dispatch, _extension, _tuned

IMPLS = ("reference", "sdpa", "cpu", "triton", "xformers", "flash_attn")
# On the CPU (2 cores), tokens up to which the C++ kernel's forward and backward beat SDPA's, packed or in bf16; dense
# sequences in fp32 go to SDPA (benchmarks/results/cpu.csv).
SHORT = 256
# Dense heads of 64 dimensions in 16 bits are what GPUs have run. One that has not measured their length takes what
# needs less time for the larger of operations and bytes, forward and backward; all else is PyTorch's until it is
# measured. Ours moves 17 tensors of the size of Q and takes 9 products (two launches of the backward make the scores
# again), in blocks of 64 tokens; the libraries' kernels move 24 with the copies around them (into the packed
# gradient, O as it is wanted behind them, dQ in fp32) and take 7, in blocks of 128.
BLOCK, PASSES, PRODUCTS = {"triton": 64, "sdpa": 128}, {"triton": 17, "sdpa": 24}, {"triton": 9, "sdpa": 7}
OPERATIONS_A_BYTE = 184  # an H200's; an A100's to a B200's are 150 to 290
LARGEST_HEAD = {"triton": 128, "flash_attn": 256, "xformers": 256}
TAKES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "xformers": (torch.float32, torch.bfloat16, torch.float16),
    "flash_attn": (torch.bfloat16, torch.float16),
}


def measured(device_type: str, dtype: torch.dtype, length: int, head_dim: int, is_packed: bool) -> _tuned.Choice | None:
    """What this GPU has measured for such sequences."""
    kind = f"heads of {head_dim}{', packed' if is_packed else ''}"
    return _tuned.find("attention", device_type, dtype, length, kind)


def order(device_type: str, dtype: torch.dtype, length: int, head_dim: int, is_packed: bool) -> tuple[str, ...]:
    """What "auto" tries, best first."""
    if device_type == "cuda":
        is_ours = _is_predicted(dtype, head_dim, is_packed) and _bytes("triton", length) < _bytes("sdpa", length)
        choice = measured(device_type, dtype, length, head_dim, is_packed)
        return _tuned.order(choice, ("triton", "sdpa") if is_ours else ("sdpa",))
    is_ours = device_type == "cpu" and length <= SHORT and (is_packed or dtype == torch.bfloat16)
    return ("cpu", "sdpa") if is_ours else ("sdpa",)


def _is_predicted(dtype: torch.dtype, head_dim: int, is_packed: bool) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and head_dim == 64 and not is_packed


def _bytes(impl: str, length: int) -> int:
    """Of one dimension of a head in 16 bits; operations as the bytes that move in their time."""
    padded = -(-length // BLOCK[impl]) * BLOCK[impl]
    return max(2 * PASSES[impl] * length, 2 * PRODUCTS[impl] * padded * padded // OPERATIONS_A_BYTE)


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
    """Which implementation "auto" takes for sequences of up to `length` tokens, why, and why not the others."""
    tried = order(device_type, dtype, length, head_dim, is_packed)
    choice = measured(device_type, dtype, length, head_dim, is_packed)
    foresight = "predicted from bytes and operations, " if _is_predicted(dtype, head_dim, is_packed) else ""
    because = _tuned.because(choice, device_type, foresight + _tuned.UNTUNED)
    reason = partial(why_not, device_type=device_type, dtype=dtype, head_dim=head_dim)
    return _dispatch.explain("attention", IMPLS, tried, reason, because)
