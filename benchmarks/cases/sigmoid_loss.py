"""SigLIP's loss, through `fastclip.sigmoid_loss`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.case import Case, Loss, Problem, Variant
from benchmarks.cases import losses
from benchmarks.cases.losses import pairs
from fastclip.losses import sigmoid_loss
from fastclip.ops.sigmoid_loss import explain
from fastclip.testing import clip_features

SCALE, BIAS = 10.0, -10.0  # where SigLIP begins


def make_inputs(problem: Problem) -> tuple[Tensor, ...]:
    n, d, dtype = problem["n"], problem["d"], problem.torch_dtype
    image, text, scale = clip_features(n, d, kind="clip", scale=SCALE, dtype=dtype, device=problem.device)
    return image, text, scale, torch.full_like(scale, BIAS, requires_grad=True)


def exact(*inputs: Tensor) -> Tensor:
    return sigmoid_loss(*inputs, impl="reference")


def textbook(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    logits = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def operations(problem: Problem, phase: str) -> float:
    """Every pair stands alone: the logits once, and the two gradients."""
    return {"forward": 1, "backward": 2, "both": 3}[phase] * losses.product_operations(problem)


def _open_clip() -> Loss:
    return peers.open_clip_losses().SigLipLoss()


def _siglip_kernel() -> Loss:
    from siglip_kernel import fused_siglip_loss

    return lambda image, text, scale, bias: fused_siglip_loss(image, text, scale.log(), bias)


def variants(problem: Problem) -> list[Variant]:
    verdicts = explain(problem.device, problem.torch_dtype, problem["n"])
    return [
        *losses.eager_variants(problem, _open_clip, textbook),
        *losses.our_variants(problem, sigmoid_loss, verdicts, gradient_in_forward=True),
        Variant(
            "siglip_kernel",
            _siglip_kernel,
            losses.OTHERS[problem.dtype],
            peers.version_of("siglip_kernel"),
            why_not=peers.why_not("siglip_kernel", problem.device),
            gradient_in_forward=True,
        ),
    ]


def problems(device: str) -> Sequence[Problem]:
    dtypes = ("float32", "bfloat16")
    if device == "cuda":
        return (
            pairs(65536, 768, "bfloat16", device, rank=1),
            pairs(16384, 768, "bfloat16", device, rank=4),
            pairs(131072, 768, "bfloat16", device, rank=6),
        )
    return (
        *(pairs(4096, 768, dtype, rank=1, impls=("auto", "compile")) for dtype in dtypes),
        *(pairs(n, 768, dtype, rank=3, impls=("auto",), has_peak=False) for n in (64, 1024) for dtype in dtypes),
        *(pairs(8192, 768, dtype, rank=3, impls=("auto",)) for dtype in dtypes),
    )


def quick(device: str) -> Sequence[Problem]:
    dtypes = ("float32", "bfloat16")
    return tuple(pairs(n, 64, dtype, device, impls=("auto",), has_peak=False) for n in (64, 512) for dtype in dtypes)


CASE = Case("sigmoid_loss", make_inputs, exact, variants, operations, losses.traffic, problems, quick)
