"""The GPU kernels: Triton's on a GPU or in the interpreter (where bfloat16 products are wrong), and compiled offline;
that of csrc/cuda on a Hopper GPU (`test_cuda` compiles it)."""

from __future__ import annotations

import pytest
import torch
from offline_helpers import CAPABILITIES, assert_compiles
from pairs_helpers import (
    DEVICE,
    GRADIENT,
    HALF_TYPES,
    HAS_GPU,
    ONE_TYPE_EACH,
    TYPES,
    interpreter,  # noqa: F401
    set_chunks,
    widened,
)
from sigmoid_loss_helpers import (
    KINDS,
    NAMES,
    eager_sigmoid_loss,
    exact_sigmoid_loss,
    sigmoid_inputs,
    sigmoid_loss_units,
)
from torch import Tensor

from fastclip.losses import sigmoid_loss
from fastclip.ops.sigmoid_loss import chunks, cuda, sigmoid_rows, sigmoid_sum
from fastclip.testing import assert_within_budget, relative_error, value_and_gradients

pytestmark = pytest.mark.usefixtures("interpreter")


def leaves_of(n: int, m: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    image, text, *others = sigmoid_inputs(max(n, m), d, dtype=dtype, device=DEVICE)
    return [x.detach().requires_grad_() for x in (image[:n], text[:m], *others)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("impl", "dtype"), TYPES)
def test_error_budget(impl: str, dtype: torch.dtype, kind: str) -> None:
    for scale, ids in ((10.0, None), (100.0, None), (100.0, torch.arange(150, device=DEVICE) % 17)):
        inputs = sigmoid_inputs(150, 40, kind=kind, scale=scale, dtype=dtype, device=DEVICE)
        results = value_and_gradients(lambda *x, ids=ids: sigmoid_loss(*x, impl=impl, group_ids=ids), inputs)
        eager = value_and_gradients(lambda *x, ids=ids: eager_sigmoid_loss(*x, ids), inputs)
        exact = value_and_gradients(lambda *x, ids=ids: exact_sigmoid_loss(*x, ids), inputs, torch.float64)
        # A GPU's own exponential, 2 ulp, errs alike for all pairs that are alike.
        assert_within_budget(results, eager, exact, sigmoid_loss_units(inputs, ids), floor=1e-6 if HAS_GPU else 5e-7)


@pytest.mark.parametrize(
    ("n", "m", "d", "offset"), [(1, 1, 1, 0), (1, 9, 7, 3), (65, 129, 513, 64), (300, 500, 33, 190)]
)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("impl", "dtype"), ONE_TYPE_EACH)
def test_rectangular_blocks_agree_with_the_reference(
    impl: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    m: int,
    d: int,
    offset: int,
    grouped: bool,
) -> None:
    """Several chunks of dz, and more blocks of rows than share their columns."""
    set_chunks(monkeypatch, 128, 192, chunks, cuda)
    leaves = leaves_of(n, m, d, dtype)
    ids = (torch.arange(n, device=DEVICE) % 5, torch.arange(m, device=DEVICE) % 6) if grouped else (None, None)
    weights, bound = torch.linspace(-1, 2, n, device=DEVICE), 1e-5 if dtype == torch.float32 else GRADIENT[dtype]
    for total in (
        lambda *x, impl: sigmoid_sum(*x, *ids, offset, weights, impl),
        lambda *x, impl: sigmoid_rows(*x, *ids, offset, impl) @ weights,
    ):
        ours, plain = (
            value_and_gradients(lambda *x, i=name, total=total: total(*x, impl=i), inputs)
            for name, inputs in ((impl, leaves), ("reference", widened(leaves)))
        )
        for name, a, b in zip(NAMES, ours, plain, strict=True):
            cancels = dtype != torch.float32 and name == "d_logit_scale"  # cosines of either sign, times rounded dz
            assert (a - b).norm() <= (1e-2 if cancels else bound) * b.norm() + 1e-6, name


@pytest.mark.parametrize("bias", [-30.0, -45.0])
@pytest.mark.parametrize(("impl", "dtype"), ONE_TYPE_EACH)
def test_small_losses_keep_their_relative_accuracy(impl: str, dtype: torch.dtype, bias: float) -> None:
    image, text = (torch.eye(70, dtype=dtype, device=DEVICE).requires_grad_() for _ in range(2))
    inputs = (image, text, *(torch.tensor(x, device=DEVICE, requires_grad=True) for x in (-2 * bias, bias)))
    results = value_and_gradients(lambda *x: sigmoid_loss(*x, impl=impl), inputs)
    exact = value_and_gradients(exact_sigmoid_loss, inputs, torch.float64)
    assert 0 < exact[0] < 1e-10
    for name, value, truth in zip(NAMES, results, exact, strict=True):
        if dtype == torch.float32 or name in ("loss", "d_logit_bias"):  # the others are sums of float16
            assert relative_error(value, truth) < (2e-6 if impl == "triton" else 4e-6), name


@pytest.mark.parametrize(("impl", "dtype"), HALF_TYPES)
def test_half_precision_keeps_small_gradients(impl: str, dtype: torch.dtype) -> None:
    """Weights of 1e-9, far below what float16 holds: dz is scaled before it is rounded."""
    inputs = sigmoid_inputs(64, 32, kind="clip", dtype=dtype, device=DEVICE)
    tiny, plain = (
        torch.autograd.grad(sigmoid_sum(*inputs, None, None, 0, torch.full((64,), w, device=DEVICE), impl), inputs[2])[
            0
        ].item()
        for w in (1e-9, 1.0)
    )
    assert tiny == pytest.approx(1e-9 * plain, rel=1e-5)


@pytest.mark.parametrize(("impl", "dtype"), ONE_TYPE_EACH)
def test_what_is_not_finite_shows(impl: str, dtype: torch.dtype) -> None:
    image, *others = sigmoid_inputs(70, 8, dtype=dtype, device=DEVICE)
    image = image.detach().clone()
    image[3, 2] = torch.nan
    rows = sigmoid_loss(image, *others, reduction="none", impl=impl)
    assert rows.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(("impl", "dtype"), ONE_TYPE_EACH)
def test_bitwise_deterministic_and_any_strides(impl: str, dtype: torch.dtype) -> None:
    image, *others = sigmoid_inputs(150, 24, dtype=dtype, device=DEVICE)
    turned = image.detach().T.contiguous().T.requires_grad_()
    runs = [value_and_gradients(lambda *x: sigmoid_loss(*x, impl=impl), (x, *others)) for x in (image, image, turned)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability: int) -> None:
    assert assert_compiles(capability, "sigmoid_loss.triton") == {80: 3, 90: 9, 100: 3}[capability]
