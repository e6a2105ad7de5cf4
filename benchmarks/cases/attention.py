"""Attention at the shapes of CLIP's towers, from the QKV product to the input of the product behind it, and back.

Three cases: an image tower's, a text tower's padded (causal), and a text tower's on packed captions of mean 16 tokens.
Beside eager code and each of PyTorch's fused backends, which are given views of the same product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import Case, Loss, Problem, Variant
from benchmarks.cases.encoders import BUDGETS, our_variants, probe
from fastclip.ops.attention import attention, explain

CAPTIONS = (8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 14, 15, 20, 34, 60)  # tokens; repeated, the last one cut to fit


def shape(n: int, d: int, h: int, b: int, dtype: str, device: str = "cpu", **options: Any) -> Problem:
    """n tokens of b sequences in h heads of d dimensions; of packed captions n is all tokens and b stays 1."""
    options.setdefault("has_peak", device == "cuda")
    return Problem((("n", n), ("d", d), ("h", h), ("b", b)), dtype, device, **options)


def bounds(total: int) -> list[int]:
    """cu_seqlens of packed captions."""
    ends = [0]
    while ends[-1] < total:
        ends.append(min(total, ends[-1] + CAPTIONS[(len(ends) - 1) % len(CAPTIONS)]))
    return ends


def eager(qkv: Tensor, causal: bool) -> Tensor:
    """What everybody writes, with its matrix of scores."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    return probe((scores.softmax(-1) @ v).transpose(1, 2).contiguous())


def _fused(backend: SDPBackend, causal: bool) -> Callable[[], Loss]:
    def loss(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal)
        return probe(out.transpose(1, 2).contiguous())

    return lambda: loss


def _case(op: str, causal: bool, packed: bool, problems: Any, quick: Any) -> Case:
    def make_inputs(problem: Problem) -> tuple[Tensor, ...]:
        """Values away from zero, so that the scalar does not cancel."""
        generator = torch.Generator().manual_seed(0)
        rows = (problem["n"],) if packed else (problem["b"], problem["n"])
        qkv = torch.randn(*rows, 3, problem["h"], problem["d"], generator=generator)
        qkv[..., 2, :, :] += 1
        return (qkv.to(problem.device, problem.torch_dtype).requires_grad_(),)

    def ours(qkv: Tensor, impl: str) -> Tensor:
        where: tuple[Any, ...] = ()
        if packed:
            ends = bounds(len(qkv))
            where = (torch.tensor(ends, dtype=torch.int32, device=qkv.device), max(CAPTIONS))
        return probe(attention(qkv, *where, causal=causal, impl=impl))

    def variants(problem: Problem) -> list[Variant]:
        """The baseline is SDPA as PyTorch dispatches it; packed captions are padded for it, and back."""
        budget, version = BUDGETS[problem.dtype], f"torch {torch.__version__}"
        found = [Variant("sdpa", lambda: lambda qkv: ours(qkv, "sdpa"), budget, version, is_baseline=True)]
        if not packed:
            found.append(Variant("eager", lambda: lambda qkv: eager(qkv, causal), budget, version))
            backends = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION") if problem.device == "cuda" else ()
            for name in backends:
                load = _fused(getattr(SDPBackend, name), causal)
                found.append(Variant(f"sdpa_{name.partition('_')[0].lower()}", load, budget, version))
        longest = max(CAPTIONS) if packed else problem["n"]
        verdicts = explain(problem.device, problem.torch_dtype, longest, problem["d"], packed)
        return [*found, *our_variants(problem, ours, verdicts, skip=("sdpa", "reference"))]

    def squares(problem: Problem) -> float:
        if packed:
            return float(sum((end - start) ** 2 for start, end in pairwise(bounds(problem["n"]))))
        return float(problem["b"] * problem["n"] ** 2)

    def operations(problem: Problem, phase: str) -> float:
        """Two products forward and five backward, half of each where causal."""
        products = {"forward": 2, "backward": 5, "both": 7}[phase]
        return 2 * products * squares(problem) * problem["h"] * problem["d"] / (2 if causal else 1)

    def traffic(problem: Problem, phase: str) -> float:
        """Forward reads QKV and writes O; backward reads QKV, O and dO and writes dQKV."""
        unit = problem["b"] * problem["n"] * problem["h"] * problem["d"] * problem.torch_dtype.itemsize
        return unit * {"forward": 4.0, "backward": 8.0, "both": 12.0}[phase]

    def exact(qkv: Tensor) -> Tensor:
        return ours(qkv, "reference")

    return Case(op, make_inputs, exact, variants, operations, traffic, problems, quick)


def _image(device: str) -> Sequence[Problem]:
    """B/32, B/16, L/14, H/14, bigG/14 and L/14 at 336."""
    if device == "cuda":
        first = ((50, 64, 12, 1024), (197, 64, 12, 1024), (257, 64, 16, 1024), (257, 80, 16, 512))
        more = ((257, 88, 16, 512), (257, 104, 16, 256), (577, 64, 16, 256), (256, 72, 16, 512))
        ranked = [(1, tower) for tower in first] + [(6, tower) for tower in more]
        return tuple(shape(*tower, "bfloat16", device, rank=rank) for rank, tower in ranked)
    towers = ((50, 64, 12, 16), (197, 64, 12, 4), (257, 64, 16, 2), (257, 80, 16, 2), (577, 64, 16, 1))
    return tuple(shape(*tower, dtype, rank=3) for dtype in ("float32", "bfloat16") for tower in towers)


def _text(device: str) -> Sequence[Problem]:
    if device == "cuda":
        return (shape(77, 64, 8, 1024, "bfloat16", device, rank=1), shape(32, 64, 8, 1024, "bfloat16", device, rank=6))
    return tuple(shape(77, 64, 8, 16, dtype, rank=3) for dtype in ("float32", "bfloat16"))


def _packed(device: str) -> Sequence[Problem]:
    if device == "cuda":
        return (shape(16384, 64, 8, 1, "bfloat16", device, rank=1),)
    return tuple(shape(512, 64, 8, 1, dtype, rank=3) for dtype in ("float32", "bfloat16"))


def _quick(device: str) -> Sequence[Problem]:
    return (shape(50, 64, 4, 2, "float32", device, impls=("auto",), has_peak=False),)


CASES = (
    _case("attention", False, False, _image, _quick),
    _case("causal_attention", True, False, _text, _quick),
    _case("packed_attention", True, True, _packed, _quick),
)
