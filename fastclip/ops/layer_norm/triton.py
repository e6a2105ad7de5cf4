"""Triton kernels of LayerNorm with a residual: one row a program forward; backward a fixed share of the rows a program,
with the sums for weight and bias in registers, so that they do not depend on the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 256  # programs of the backward at most


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, mean_ptr, rstd_ptr, eps,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = offs < W
    total = tl.load(x_ptr + row * W + offs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * W + offs, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * W + offs, rounded, mask=mask)
        total = rounded.to(tl.float32)
    mean = tl.sum(total, 0) / W
    off = tl.where(mask, total - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(off * off, 0) / W + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = off * rstd * weight + bias
    tl.store(out_ptr + row * W + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    d_out_ptr, d_total_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, d_x_ptr, partial_ptr, rows,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_x, and the sums of each program's rows for weight and bias: (parts, 2, W)."""
    part, offs = tl.program_id(0), tl.arange(0, BLOCK)
    mask = offs < W
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    d_weight, d_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    stride = tl.full((), W, tl.int64)
    for row in range(part, rows, tl.num_programs(0)):
        at = row * stride + offs
        rstd = tl.load(rstd_ptr + row)
        d_out = tl.load(d_out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        off = (tl.load(total_ptr + at, mask=mask, other=0.0).to(tl.float32) - tl.load(mean_ptr + row)) * rstd
        off = tl.where(mask, off, 0.0)
        d_weight += d_out * off
        d_bias += d_out
        g = d_out * weight
        d_x = (g - tl.sum(g, 0) / W - off * (tl.sum(g * off, 0) / W)) * rstd
        if d_total_ptr is not None:
            d_x += tl.load(d_total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + part * 2 * W + offs, d_weight, mask=mask)
    tl.store(partial_ptr + (part * 2 + 1) * W + offs, d_bias, mask=mask)


INTERPRETED = not isinstance(_layer_norm_fwd_kernel, triton.JITFunction)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _arguments(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"W": width, "BLOCK": block, "num_warps": min(16, max(1, block // 256)), "num_stages": 1}


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, s, mean, rstd); s is empty without a residual."""
    x, width = x.contiguous(), x.shape[-1]
    rows = x.numel() // width if width else 0
    out, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    residual = None if residual is None else residual.contiguous()
    if rows:
        with _on(x.device):
            _layer_norm_fwd_kernel[(rows,)](x, residual, weight, bias, out, total, mean, rstd, eps, **_arguments(width))
    return out, total, mean, rstd


def layer_norm_bwd(
    d_out: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for s and, in fp32, for weight and bias."""
    d_out, total, rows, width = d_out.contiguous(), total.contiguous(), mean.numel(), weight.numel()
    d_total = None if d_total is None else d_total.contiguous()
    d_x, parts = torch.empty_like(total), min(PARTS, rows)
    partial = mean.new_empty(parts, 2, width)
    if rows:
        with _on(total.device):
            _layer_norm_bwd_kernel[(parts,)](
                d_out, d_total, total, weight, mean, rstd, d_x, partial, rows, **_arguments(width)
            )
    d_weight, d_bias = partial.sum(0).unbind(0)
    return d_x, d_weight.clone(), d_bias.clone()


def configurations() -> list[dict[str, Any]]:
    """Every kernel in its launch configurations, as `fastclip.testing.compile_offline` takes them."""
    cases = []
    for kernel in (_layer_norm_fwd_kernel, _layer_norm_bwd_kernel):
        for name in ("fp16", "bf16", "fp32"):
            for width in (512, 768, 1024, 1280, 1664, 1792):
                single = ("mean_ptr", "rstd_ptr", "partial_ptr")
                types = {
                    x: "fp32" if x == "eps" else "i32" if x == "rows" else "*fp32" if x in single else f"*{name}"
                    for x in kernel.arg_names
                }
                constants = _arguments(width)
                options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
                cases.append({"kernel": kernel, "types": types, "constants": constants, "options": options})
    return cases
