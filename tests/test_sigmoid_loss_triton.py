"""The Triton kernel in the interpreter (float32, float16: bfloat16 products are wrong there), and compiled offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from sigmoid_loss_helpers import (
    KINDS,
    NAMES,
    eager_sigmoid_loss,
    exact_sigmoid_loss,
    sigmoid_inputs,
    sigmoid_loss_units,
)

from fastclip.losses import sigmoid_loss
from fastclip.ops.sigmoid_loss import sigmoid_rows, sigmoid_sum
from fastclip.testing import assert_within_budget, relative_error, value_and_gradients

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.fixture
def triton_kernels() -> ModuleType:
    from fastclip.ops.sigmoid_loss import triton

    if not triton.INTERPRETED and not torch.cuda.is_available():
        pytest.fail("the kernels were imported before TRITON_INTERPRET=1 was set")
    return triton


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_budget(triton_kernels: ModuleType, device: str, dtype: torch.dtype, kind: str) -> None:
    for scale, ids in ((10.0, None), (100.0, torch.arange(150, device=device) % 17)):
        inputs = sigmoid_inputs(150, 40, kind=kind, scale=scale, dtype=dtype, device=device)
        results = value_and_gradients(lambda *x, ids=ids: sigmoid_loss(*x, impl="triton", group_ids=ids), inputs)
        eager = value_and_gradients(lambda *x, ids=ids: eager_sigmoid_loss(*x, ids), inputs)
        exact = value_and_gradients(lambda *x, ids=ids: exact_sigmoid_loss(*x, ids), inputs, torch.float64)
        assert_within_budget(results, eager, exact, sigmoid_loss_units(inputs, ids))


@pytest.mark.parametrize(
    ("n", "m", "d", "offset"), [(1, 1, 1, 0), (1, 9, 7, 3), (65, 129, 513, 64), (300, 500, 33, 190)]
)
@pytest.mark.parametrize("grouped", [False, True])
def test_rectangular_blocks_agree_with_the_reference(
    triton_kernels: ModuleType,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    m: int,
    d: int,
    offset: int,
    grouped: bool,
) -> None:
    """Several chunks of dz, and more blocks of rows than share their columns."""
    monkeypatch.setattr(triton_kernels, "CHUNK_ROWS", 128)
    monkeypatch.setattr(triton_kernels, "CHUNK_COLS", 192)
    image, text, *others = sigmoid_inputs(max(n, m), d, dtype=torch.float32, device=device)
    leaves = tuple(x.detach().requires_grad_() for x in (image[:n], text[:m], *others))
    ids = (torch.arange(n, device=device) % 5, torch.arange(m, device=device) % 6) if grouped else (None, None)
    weights = torch.linspace(-1, 2, n, device=device)
    for total in (
        lambda *x, impl: sigmoid_sum(*x, *ids, offset, weights, impl),
        lambda *x, impl: sigmoid_rows(*x, *ids, offset, impl) @ weights,
    ):
        ours, plain = (
            value_and_gradients(lambda *x, i=impl, total=total: total(*x, impl=i), leaves)
            for impl in ("triton", "reference")
        )
        for name, a, b in zip(NAMES, ours, plain, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6, name


@pytest.mark.parametrize("bias", [-30.0, -45.0])
def test_small_losses_keep_their_relative_accuracy(triton_kernels: ModuleType, device: str, bias: float) -> None:
    image, text = (torch.eye(70, device=device).requires_grad_() for _ in range(2))
    inputs = (image, text, *(torch.tensor(x, device=device, requires_grad=True) for x in (-2 * bias, bias)))
    results = value_and_gradients(lambda *x: sigmoid_loss(*x, impl="triton"), inputs)
    exact = value_and_gradients(exact_sigmoid_loss, inputs, torch.float64)
    assert 0 < exact[0] < 1e-10
    for name, value, truth in zip(NAMES, results, exact, strict=True):
        assert relative_error(value, truth) < 2e-6, name


def test_half_precision_keeps_small_gradients(triton_kernels: ModuleType, device: str) -> None:
    """Weights of 1e-9, far below what float16 holds: dz is scaled before it is rounded."""
    inputs = sigmoid_inputs(64, 32, kind="clip", dtype=torch.float16, device=device)
    tiny, plain = (
        torch.autograd.grad(
            sigmoid_sum(*inputs, None, None, 0, torch.full((64,), w, device=device), "triton"), inputs[2]
        )[0].item()
        for w in (1e-9, 1.0)
    )
    assert tiny == pytest.approx(1e-9 * plain, rel=1e-5)


def test_what_is_not_finite_shows(triton_kernels: ModuleType, device: str) -> None:
    image, *others = sigmoid_inputs(70, 8, dtype=torch.float32, device=device)
    image = image.detach().clone()
    image[3, 2] = torch.nan
    rows = sigmoid_loss(image, *others, reduction="none", impl="triton")
    assert rows.isnan().nonzero().flatten().tolist() == [3]


def test_bitwise_deterministic_and_any_strides(triton_kernels: ModuleType, device: str) -> None:
    image, *others = sigmoid_inputs(150, 24, dtype=torch.float32, device=device)
    turned = image.detach().T.contiguous().T.requires_grad_()
    runs = [
        value_and_gradients(lambda *x: sigmoid_loss(*x, impl="triton"), (x, *others)) for x in (image, image, turned)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(runs[0], runs[2], strict=True))


COMPILE = """
import json, sys
from fastclip.ops.sigmoid_loss.triton import configurations
from fastclip.testing import compile_offline
cases = [(case["types"]["image"], case) for case in configurations()]
print(json.dumps([(name, *compile_offline(**case, capability=int(sys.argv[1]))) for name, case in cases]))
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    usages = json.loads(result.stdout)
    assert len(usages) == 9  # three dtypes: with groups, without, and without a gradient
    for features, registers, stack_bytes, shared_bytes in usages:
        assert stack_bytes == 0, f"{features} spills {stack_bytes} bytes on sm_{capability}"
        assert 0 < registers <= 255
        assert shared_bytes <= SHARED_BYTES[capability]
