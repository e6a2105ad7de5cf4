"""Sums over rows in parts: right in any type, without a second copy, the same bits on any number of threads."""

from __future__ import annotations

import pytest
import torch

from fastclip.ops._rows import add_scaled, dots, inner_product, parts, scaled, total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_fp64(dtype: torch.dtype) -> None:
    """Over several parts: 5,000 rows of 1,024 are 20 MB in fp32."""
    a, b, factor = torch.randn(5000, 1024).to(dtype), torch.randn(5000, 1024), torch.randn(5000)
    assert len(list(parts(a))) == 20
    exact = (a.double() * b.double()).sum(1)
    torch.testing.assert_close(dots(a, b, torch.float32).double(), exact, rtol=0, atol=1e-4)
    assert inner_product(a, b).item() == pytest.approx(exact.sum().item(), abs=1e-2)
    out = b.clone()
    add_scaled(out, factor, a)
    torch.testing.assert_close(out, b + factor[:, None] * a.float())
    assert torch.equal(scaled(b, factor[0], dtype), (b * factor[0]).to(dtype))


def test_operators_are_registered_as_they_are() -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    torch.library.opcheck(torch.ops.fastclip.inner_product.default, (a, b))
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.fastclip.scaled.default, (a, b[0, 0], dtype))


def test_totals_are_the_same_bits_on_any_number_of_threads() -> None:
    x, before, results = torch.randn(100_000), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(total(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    torch.testing.assert_close(results[0].double(), x.double().sum(), rtol=1e-5, atol=0)
