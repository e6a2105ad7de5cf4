"""What the tests of the losses' GPU kernels share: which of them run here, on what, in which types."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.ops import _cuda
from fastclip.testing import clip_features

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
NO_HOPPER = _cuda.why_not("cuda") if HAS_GPU else "no CUDA device"
ON_HOPPER = (pytest.mark.gpu, pytest.mark.skipif(NO_HOPPER is not None, reason=f"CUDA kernels: {NO_HOPPER}"))


def _case(impl: str, dtype: torch.dtype) -> Any:
    return pytest.param(impl, dtype, id=f"{impl}-{str(dtype)[6:]}", marks=ON_HOPPER if impl == "cuda" else ())


CUDA_TYPES = [_case("cuda", dtype) for dtype in (torch.float16, torch.bfloat16)]
HALF_TYPES = [_case("triton", torch.float16), *CUDA_TYPES]
# In the interpreter bfloat16 products are wrong.
TYPES = [_case("triton", torch.float32), *[_case("triton", torch.bfloat16)] * HAS_GPU, *HALF_TYPES]
# Enough where the type changes little: what a kernel makes of masks and shapes.
ONE_TYPE_EACH = [_case("triton", torch.float32), *CUDA_TYPES]

# Of a gradient, |error| / |exact|, where little cancels: what the losses promise (1.7e-3 measured in bfloat16).
GRADIENT = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}


@pytest.fixture
def interpreter() -> None:
    """The kernels run: on a GPU, or in Triton's interpreter."""
    from fastclip.ops.contrastive_loss import triton

    if not triton.INTERPRETED and not HAS_GPU:
        pytest.fail("the kernels were imported before TRITON_INTERPRET=1 was set")


def set_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, *modules: ModuleType) -> None:
    """Of dz: so small that a test's problem has several."""
    for module in modules:
        monkeypatch.setattr(module, "CHUNK_ROWS", rows, raising=False)
        monkeypatch.setattr(module, "CHUNK_COLS", columns, raising=False)


def rectangle(n: int, m: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """n image features, m text features and the scale: leaves."""
    image, text, scale = clip_features(max(n, m), d, dtype=dtype, device=DEVICE)
    return [x.detach().requires_grad_() for x in (image[:n], text[:m], scale)]


def widened(leaves: list[Tensor]) -> list[Tensor]:
    """The same numbers in float32."""
    return [x.detach().float().requires_grad_() for x in leaves]


def assert_close_to(plain: tuple[Tensor, ...], ours: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Gradients, beside those of the reference in float32."""
    for ours_of, plain_of in zip(ours, plain, strict=True):
        assert (ours_of - plain_of).norm() <= GRADIENT[dtype] * plain_of.norm() + 1e-5
