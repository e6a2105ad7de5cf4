"""Triton kernels of the activations: one pass each way, the bias's gradient as sums over fixed blocks of rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.ops.activation.reference import KINDS

BLOCK = 1024  # elements of the forward
ROWS, COLS = 16, 64  # a tile of the backward
NUM_WARPS = 4


@triton.jit
def _gate(z, KIND: tl.constexpr):
    """g with activation z g(z), and its derivative."""
    if KIND == "gelu":
        value = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif KIND == "gelu_tanh":
        argument = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        value = tl.sigmoid(argument)
        slope = value * tl.sigmoid(-argument) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    else:
        value = tl.sigmoid(1.702 * z)
        slope = value * tl.sigmoid(-1.702 * z) * 1.702
    return value, slope


@triton.jit
def _activation_fwd_kernel(x_ptr, bias_ptr, out_ptr, size, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs % width, mask=offs < size, other=0.0).to(tl.float32)
    value, _ = _gate(z, KIND)
    tl.store(out_ptr + offs, (z * value).to(out_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _activation_bwd_kernel(
    d_out_ptr, x_ptr, bias_ptr, d_x_ptr, partial_ptr, rows, width, rows_per_part,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """d_x, and of every part of the rows the sum of d_x over them: (parts, width)."""
    part, offs_w = tl.program_id(1), tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask_w = offs_w < width
    shift = tl.zeros((COLS,), tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    sums = tl.zeros((COLS,), tl.float32)
    for start in range(part * rows_per_part, tl.minimum(rows, (part + 1) * rows_per_part), ROWS):
        offs_r = start + tl.arange(0, ROWS)
        offs = offs_r.to(tl.int64)[:, None] * width + offs_w[None, :]
        mask = (offs_r < rows)[:, None] & mask_w[None, :]
        z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + shift[None, :]
        d_out = tl.load(d_out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        value, slope = _gate(z, KIND)
        d_x = d_out * (value + z * slope)
        tl.store(d_x_ptr + offs, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        sums += tl.sum(d_x, 0)
    tl.store(partial_ptr + part.to(tl.int64) * width + offs_w, sums, mask=mask_w)


INTERPRETED = not isinstance(_activation_fwd_kernel, triton.JITFunction)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def activation_fwd(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The activation of x + bias."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.numel()
    if size:
        with _on(x.device):
            _activation_fwd_kernel[(triton.cdiv(size, BLOCK),)](
                x, bias, out, size, x.shape[-1], KIND=kind, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return out


def activation_bwd(d_out: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients for x and, in fp32, for the bias."""
    d_out, x = d_out.contiguous(), x.contiguous()
    d_x, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width if width else 0
    rows_per_part = max(ROWS, triton.cdiv(triton.cdiv(rows, 64), ROWS) * ROWS)  # 64 parts at most, whatever the device
    parts = triton.cdiv(rows, rows_per_part)
    partial = x.new_empty((parts, width), dtype=torch.float32)
    if rows:
        with _on(x.device):
            _activation_bwd_kernel[(triton.cdiv(width, COLS), parts)](
                d_out, x, bias, d_x, partial, rows, width, rows_per_part,
                KIND=kind, ROWS=ROWS, COLS=COLS, num_warps=NUM_WARPS,
            )  # fmt: skip
    return d_x, partial.sum(0)


def configurations() -> list[dict[str, Any]]:
    """Every kernel in its launch configurations, as `fastclip.testing.compile_offline` takes them."""
    cases = []
    for kernel in (_activation_fwd_kernel, _activation_bwd_kernel):
        for name in ("fp16", "bf16", "fp32"):
            for kind in KINDS:
                blocks = {"BLOCK": BLOCK} if kernel is _activation_fwd_kernel else {"ROWS": ROWS, "COLS": COLS}
                special = {"partial_ptr": "*fp32"}
                types = {x: special.get(x, f"*{name}" if x.endswith("_ptr") else "i32") for x in kernel.arg_names}
                options = {"num_warps": NUM_WARPS, "num_stages": 2}
                cases.append(
                    {"kernel": kernel, "types": types, "constants": {"KIND": kind, **blocks}, "options": options}
                )
    return cases
