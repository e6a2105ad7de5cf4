"""Sums over rows of features that hold no second copy of them, and come out the same whatever the number of threads."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1024


def parts(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x (n, D) whose copy in fp32 takes 1 MB, or 64 MB off the CPU."""
    step = max(1, (1 << (18 if x.device.type == "cpu" else 24)) // x.shape[1])
    return (slice(start, min(start + step, x.shape[0])) for start in range(0, x.shape[0], step))


def dots(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a_i . b_i in `dtype` of the rows of a and b (n, D), in any type; (n,)."""
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


def _scaled_fake(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


_library = torch.library.Library("fastclip", "FRAGMENT")
_library.define("inner_product(Tensor a, Tensor b) -> Tensor")
_library.define("scaled(Tensor x, Tensor factor, ScalarType dtype) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("inner_product", _inner_product, _key)
    _library.impl("scaled", _scaled, _key)
torch.library.register_fake("fastclip::inner_product", lambda a, b: b.new_empty(()), lib=_library)
torch.library.register_fake("fastclip::scaled", _scaled_fake, lib=_library)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """sum_ij a_ij b_ij of a (n, D) in any type and b (n, D), in the type of b; 0-dim. Not differentiable."""
    return torch.ops.fastclip.inner_product(a, b)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor x rounded once to `dtype`, for x (n, D) or 0-dim and a 0-dim factor. Not differentiable."""
    return torch.ops.fastclip.scaled(x, factor, dtype)
