"""Sums over rows of features that hold no second copy of them, and come out the same whatever the number of threads."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.ops import _cuda

_ROWS = 1024


def parts(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x (n, D) whose copy in fp32 takes 1 MB, or 64 MB off the CPU."""
    step = max(1, (1 << (18 if x.device.type == "cpu" else 24)) // x.shape[1])
    return (slice(start, min(start + step, x.shape[0])) for start in range(0, x.shape[0], step))


def dots(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a_i . b_i in `dtype` of the rows of a and b (n, D), in any type; (n,)."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype.itemsize == 2 and _cuda.why_not("cuda") is None:
        out = a.new_empty(a.shape[0], dtype=torch.float32)
        _cuda.launch("fastclip_dots", (a.contiguous(), b.contiguous(), out), (*a.shape, a.dtype == torch.float16))
        return out
    return torch.cat([(a[rows].to(dtype) * b[rows].to(dtype)).sum(1) for rows in parts(a)])


def add_scaled(out: Tensor, factor: Tensor, x: Tensor) -> None:
    """out_i += factor_i x_i in place, for x (n, D) in any type and factor (n,)."""
    for rows in parts(out):
        out[rows].addcmul_(factor[rows, None], x[rows].to(out.dtype))


def total(x: Tensor) -> Tensor:
    """The sum of x (n,), in parts whose order does not depend on the number of threads as `Tensor.sum`'s does."""
    return F.pad(x, (0, -x.shape[0] % _ROWS)).view(-1, _ROWS).sum(1).sum()


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    return total(dots(a, b, b.dtype))


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype or x.ndim == 0:
        return (x * factor).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    for rows in parts(x):
        out[rows] = x[rows] * factor
    return out


def _scaled_and_inner(x: Tensor, a: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _scaled(x, factor, dtype), _inner_product(a, x)


def _on_cuda(x: Tensor, a: Tensor | None, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    """Both in one pass by the kernel of csrc/cuda, where it can: (scaled, a_i . x_i)."""
    is_taken = x.dtype == factor.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16) and x.ndim == 2
    if not is_taken or not x.is_contiguous() or _cuda.why_not("cuda") is not None:
        return None
    if a is not None and (a.dtype != dtype or not a.is_contiguous()):
        return None
    out, each = torch.empty_like(x, dtype=dtype), None if a is None else x.new_empty(x.shape[0])
    _cuda.launch("fastclip_scaled", (x, a, factor, out, each), (*x.shape, dtype == torch.float16))
    return out, each


def _scaled_cuda(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    made = _on_cuda(x, None, factor, dtype)
    return _scaled(x, factor, dtype) if made is None else made[0]


def _scaled_and_inner_cuda(x: Tensor, a: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = _on_cuda(x, a, factor, dtype)
    if made is None or made[1] is None:
        return _scaled_and_inner(x, a, factor, dtype)
    return made[0], made[1].sum()


def _scaled_fake(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _scaled_and_inner_fake(x: Tensor, a: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(())


_library = torch.library.Library("fastclip", "FRAGMENT")
_library.define("inner_product(Tensor a, Tensor b) -> Tensor")
_library.define("scaled(Tensor x, Tensor factor, ScalarType dtype) -> Tensor")
_library.define("scaled_and_inner(Tensor x, Tensor a, Tensor factor, ScalarType dtype) -> (Tensor, Tensor)")
for _key in ("CPU", "CUDA"):
    _library.impl("inner_product", _inner_product, _key)
_library.impl("scaled", _scaled, "CPU")
_library.impl("scaled", _scaled_cuda, "CUDA")
_library.impl("scaled_and_inner", _scaled_and_inner, "CPU")
_library.impl("scaled_and_inner", _scaled_and_inner_cuda, "CUDA")
torch.library.register_fake("fastclip::inner_product", lambda a, b: b.new_empty(()), lib=_library)
torch.library.register_fake("fastclip::scaled", _scaled_fake, lib=_library)
torch.library.register_fake("fastclip::scaled_and_inner", _scaled_and_inner_fake, lib=_library)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """sum_ij a_ij b_ij of a (n, D) in any type and b (n, D), in the type of b; 0-dim. Not differentiable."""
    return torch.ops.fastclip.inner_product(a, b)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor x rounded once to `dtype`, for x (n, D) or 0-dim and a 0-dim factor. Not differentiable."""
    return torch.ops.fastclip.scaled(x, factor, dtype)


def scaled_and_inner(x: Tensor, a: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`scaled(x, factor, dtype)` and `inner_product(a, x)` of x (n, D)."""
    return torch.ops.fastclip.scaled_and_inner(x, a, factor, dtype)
