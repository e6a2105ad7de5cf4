"""CLIP's loss: the softmax family's block, through `fastclip.contrastive_loss`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.case import Case, Loss, Problem, Variant
from benchmarks.cases import losses
from benchmarks.cases.losses import pairs
from fastclip._version import __version__
from fastclip.losses import contrastive_loss
from fastclip.losses.small import is_made_at_once
from fastclip.ops.contrastive_loss import explain, measured
from fastclip.testing import clip_features

SCALE = 100.0


def make_inputs(problem: Problem) -> tuple[Tensor, ...]:
    """Features like a trained model's, at the scale where CLIP stands from its first epochs on."""
    n, d, dtype = problem["n"], problem["d"], problem.torch_dtype
    return clip_features(n, d, kind="clip", scale=SCALE, dtype=dtype, device=problem.device)


def exact(*inputs: Tensor) -> Tensor:
    return contrastive_loss(*inputs, impl="reference")


def textbook(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def operations(problem: Problem, phase: str) -> float:
    """The sums of rows and columns from one product; again the logits, and the two gradients."""
    return {"forward": 1, "backward": 3, "both": 4}[phase] * losses.product_operations(problem)


def _open_clip() -> Loss:
    return peers.open_clip_losses().ClipLoss()


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        both = (cal_flash_loss(x, y, scale=scale) for x, y in ((image, text), (text, image)))
        return sum(x.mean() for x in both) / 2

    return loss


def _memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    module = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda image, text, scale: module(image, text)  # its temperature is a number and has no gradient


def _with_budget(n: int) -> Callable[[], Loss]:
    """With room for all logits in fp32."""
    return lambda: partial(contrastive_loss, memory_budget=4 * n * n)


def _makes_gradient_first(problem: Problem, variant: Variant) -> Variant:
    """Of a small batch the forward makes the gradient too."""
    one = torch.empty((), dtype=problem.torch_dtype, device=problem.device)
    features = one.expand(problem["n"], problem["d"]).requires_grad_()
    impl = "auto" if variant.impl == "budget" else variant.impl
    return replace(variant, gradient_in_forward=is_made_at_once(features, features, features, impl, measured))


def variants(problem: Problem) -> list[Variant]:
    n, budget = problem["n"], losses.OTHERS[problem.dtype]
    reasons = {name: peers.why_not(name, problem.device) for name in ("inf_cl", "memeff")}
    if reasons["inf_cl"] is None and problem["d"] % 256:
        reasons["inf_cl"] = f"inf_cl takes D in multiples of 256, not {problem['d']}"
    ours = losses.our_variants(problem, contrastive_loss, explain(problem.device, problem.torch_dtype, n))
    ours.append(
        Variant("budget", _with_budget(n), losses.OURS[problem.dtype], f"fastclip {__version__}", is_quadratic=True)
    )
    return [
        *losses.eager_variants(problem, _open_clip, textbook),
        *(_makes_gradient_first(problem, variant) for variant in ours),
        Variant("inf_cl", _inf_cl, budget, peers.version_of("inf_cl"), why_not=reasons["inf_cl"]),
        Variant(
            "memeff", _memeff, budget, peers.version_of("memeff"), why_not=reasons["memeff"], without_gradient=(2,)
        ),
    ]


def problems(device: str) -> Sequence[Problem]:
    """The CPU's answer what a user's machine does at any size, the GPU's what large batches cost."""
    if device == "cuda":
        return (
            pairs(32768, 512, "bfloat16", device, rank=0),
            pairs(131072, 512, "bfloat16", device, rank=2),
            pairs(32768, 512, "float16", device, rank=3),
            pairs(8192, 512, "bfloat16", device, rank=4),
            pairs(131072, 1024, "bfloat16", device, rank=5),
            *(pairs(n, 512, "bfloat16", device, rank=6) for n in (256, 1024, 4096)),
            pairs(1 << 20, 512, "bfloat16", device, rank=7),
            pairs(32768, 512, "float32", device, rank=8),
        )
    alone, dtypes = ("auto",), ("float32", "bfloat16")
    return (
        *(pairs(8192, 512, dtype, rank=0, impls=("auto", "budget", "compile")) for dtype in dtypes),
        *(pairs(1024, 512, dtype, rank=1, has_peak=False) for dtype in dtypes),
        *(pairs(n, 512, dtype, rank=2, impls=alone, has_peak=False) for n in (16, 64, 256) for dtype in dtypes),
        *(pairs(4096, 512, dtype, rank=2, impls=alone) for dtype in dtypes),
        *(pairs(16384, 512, dtype, rank=4, impls=alone, has_peak=False) for dtype in dtypes),
        *(pairs(65536, 512, dtype, rank=5, impls=alone, is_timed=False) for dtype in dtypes),
    )


def quick(device: str) -> Sequence[Problem]:
    dtypes = ("float32", "bfloat16")
    return tuple(pairs(n, 64, dtype, device, impls=("auto",), has_peak=False) for n in (64, 512) for dtype in dtypes)


CASE = Case("contrastive_loss", make_inputs, exact, variants, operations, losses.traffic, problems, quick)
