"""Attention by the kernels of `triton_kernels`: which tiles for which sequences, and the launches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from fastclip.ops.attention.triton_kernels import _bwd_kernel, _fwd_kernel

HEAD_DIMS = (64, 72, 80, 88, 104, 112, 128)  # those of published CLIP towers; others run too


INTERPRETED = not isinstance(_fwd_kernel, triton.JITFunction)


@dataclass(frozen=True)
class Tiles:
    """Launch configuration: rows of a block, rows of a step within, and how it is run."""

    block: int
    step: int
    whole: bool  # all sequences fit into one block
    num_warps: int
    num_stages: int
    split: bool = False  # a program a block instead of a sequence; backward only dense ones, and with `keys`
    keys: Tiles | None = None  # the backward's second launch, along the keys; the first goes along the queries


def _parts(head_dim: int) -> tuple[int, int]:
    """(D1, D2), the tiles that hold a head."""
    if 64 < head_dim <= 96:
        return 64, 16 if head_dim <= 80 else 32
    return max(16, triton.next_power_of_2(head_dim)), 0


def _tiles(
    dtype: torch.dtype, head_dim: int, longest: int, average: float, causal: bool, is_backward: bool, is_dense: bool
) -> Tiles:
    """For sequences of up to `longest` rows; each of its results compiles for sm_80, sm_90 and sm_100 without a spill.
    Those of dense heads of 64 dimensions won a sweep on an H200 at 197 and 257 rows, and at 77 causal ones.

    One tile where all fit, but small blocks where most sequences are far shorter than the longest (packed captions).
    """
    single = dtype == torch.float32
    block = 16 if single else 32 if average <= 32 and head_dim <= 64 else 64
    largest = 64 if not single else 16 if is_backward or head_dim > 64 else 32
    if longest <= min(largest, 2 * block):
        tile = max(16, triton.next_power_of_2(longest))
        warps = 8 if is_backward and tile == 64 else max(1, tile // 16)
        return Tiles(tile, tile, True, num_warps=4 if single else warps, num_stages=1)
    if single:
        if 80 < head_dim <= 96 and not is_backward:
            return Tiles(32, 32, False, num_warps=8, num_stages=1)
        return Tiles(block, block, False, num_warps=4 if head_dim <= 96 else 8, num_stages=1)
    if is_dense and is_backward and (longest > 128 or not causal):
        if head_dim > 64:
            keys = Tiles(64, 32, False, num_warps=8, num_stages=2, split=True)
            return replace(keys, keys=keys)
        keys = Tiles(64, 32, False, num_warps=4, num_stages=3, split=True)
        return Tiles(64, 64, False, num_warps=4, num_stages=2, split=True, keys=keys)
    if is_backward:
        return Tiles(block, 32, False, num_warps=4 if head_dim <= 64 else 8, num_stages=1)
    if is_dense and head_dim <= 64:
        is_long = longest > 128
        return Tiles(block, 32 if is_long else 64, False, 4, num_stages=3 if is_long else 1, split=is_long)
    return Tiles(block, 32, False, num_warps=4, num_stages=1 if block < 64 else 2, split=block == 64)


def _rest(rows: int) -> int:
    """The tile that holds what is left of a sequence behind its full tiles, 0 for none."""
    return max(16, triton.next_power_of_2(rows)) if rows else 0


def _tail(longest: int, block: int) -> int:
    """The rest's block where it is smaller, else 0."""
    rest = _rest(longest % block)
    return rest if rest < block else 0


def _constants(causal: bool, heads: int, head_dim: int, longest: int, is_dense: bool, tiles: Tiles) -> dict[str, Any]:
    d1, d2 = _parts(head_dim)
    last = _rest(longest % tiles.step) if is_dense and not causal else 0
    tail = _tail(longest, tiles.block) if is_dense and tiles.split and head_dim <= 64 else 0
    blocks = {"BLOCK": tiles.block, "TAIL": tail, "STEP": tiles.step, "LAST": last or tiles.step}
    parts = triton.cdiv(longest, tiles.block) if tiles.split else 1
    ways = {"CAUSAL": causal, "WHOLE": tiles.whole, "PARTS": parts}
    return {"H": heads, "D": head_dim, "D1": d1, "D2": d2} | ways | blocks


def _launches(tiles: Tiles, is_backward: bool) -> list[tuple[Tiles, dict[str, Any]]]:
    """Each launch and the arguments that are its own."""
    if not is_backward:
        return [(tiles, {})]
    if tiles.keys is None:
        return [(tiles, {"ALONG": None})]
    return [(tiles, {"ALONG": "queries"}), (tiles.keys, {"ALONG": "keys"})]


def _plan(
    x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, causal: bool, is_backward: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of each launch how many programs, and the arguments that all kernels share; nothing for nothing."""
    total, _, heads, head_dim = x.shape
    is_dense = cu_seqlens is None
    sequences = (total // max_seqlen if max_seqlen else 0) if cu_seqlens is None else cu_seqlens.numel() - 1
    if sequences * total == 0:
        return
    tiles = _tiles(x.dtype, head_dim, max_seqlen, total / sequences, causal, is_backward, is_dense)
    for launch, own in _launches(tiles, is_backward):
        constants = _constants(causal, heads, head_dim, max_seqlen, is_dense, launch) | own
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        yield sequences * heads * constants["PARTS"], constants | options


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Packed (T, 3, H, D) -> (T, H, D), and the lse (H, T) in units of log2."""
    qkv = qkv.contiguous()
    total, _, heads, head_dim = qkv.shape
    out, lse = qkv.new_empty(total, heads, head_dim), qkv.new_empty((heads, total), dtype=torch.float32)
    for programs, arguments in _plan(qkv, cu_seqlens, max_seqlen, causal, is_backward=False):
        with _on(qkv.device):
            _fwd_kernel[(programs,)](qkv, cu_seqlens, out, lse, max_seqlen, total, softmax_scale, **arguments)
    return out, lse


def attention_bwd(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    causal: bool,
    softmax_scale: float,
) -> Tensor:
    """The gradient for qkv: (T, 3, H, D)."""
    qkv, d_out = qkv.contiguous(), d_out.contiguous()
    d_qkv, delta, total = torch.empty_like(qkv), torch.empty_like(lse), qkv.shape[0]
    for programs, arguments in _plan(qkv, cu_seqlens, max_seqlen, causal, is_backward=True):
        with _on(qkv.device):
            _bwd_kernel[(programs,)](
                d_out, qkv, out, lse, cu_seqlens, delta, d_qkv, max_seqlen, total, softmax_scale, **arguments
            )
    return d_qkv


def configurations_of(
    kernel: Any, dtype: torch.dtype, heads: int, head_dim: int, longest: int, causal: bool, is_dense: bool, tiles: Tiles
) -> list[dict[str, Any]]:
    """One kernel's launches, as `fastclip.testing.compile_offline` takes them."""
    special = {"cu_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32"}
    pointer = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    types = {x: special.get(x, pointer if x.endswith("_ptr") else "i32") for x in kernel.arg_names}
    cases = []
    for launch, own in _launches(tiles, kernel is _bwd_kernel):
        constants = _constants(causal, heads, head_dim, longest, is_dense, launch) | own
        constants |= {"cu_ptr": None} if is_dense else {}
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        cases.append({"kernel": kernel, "types": types, "constants": constants, "options": options})
    return cases


def configurations() -> list[dict[str, Any]]:
    """Every kernel in the launch configurations of published towers: text causal, dense and with bounds, images dense.

    float16 runs the code of bfloat16.
    """
    images = [(head_dim, n, n, False, True) for head_dim in HEAD_DIMS for n in (50, 197, 257, 577)]
    texts = [(64, n, average, True, n == average) for n, average in ((32, 32), (77, 77), (77, 16), (77, 50))]
    cases = {}
    for dtype, shape, kernel in itertools.product(
        (torch.bfloat16, torch.float32), images + texts, (_fwd_kernel, _bwd_kernel)
    ):
        head_dim, longest, average, causal, is_dense = shape
        tiles = _tiles(dtype, head_dim, longest, average, causal, kernel is _bwd_kernel, is_dense)
        for case in configurations_of(kernel, dtype, 8, head_dim, longest, causal, is_dense, tiles):
            cases[kernel, dtype, str(case["constants"])] = case
    return list(cases.values())
