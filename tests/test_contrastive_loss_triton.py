"""The Triton kernels in the interpreter (float32, float16: bfloat16 products are wrong there), and compiled offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from losses_helpers import OPTIONS, make_problem
from torch.utils._pytree import tree_map_only

from fastclip.losses import contrastive_loss
from fastclip.ops.contrastive_loss import contrastive_block
from fastclip.testing import (
    assert_within_budget,
    clip_features,
    contrastive_loss_units,
    eager_contrastive_loss,
    exact_contrastive_loss,
    relative_error,
    textbook_contrastive_loss,
    value_and_gradients,
)

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # lanes that are masked


@pytest.fixture
def triton_kernels() -> Iterator[ModuleType]:
    from fastclip.ops.contrastive_loss import triton

    if not triton.INTERPRETED and not torch.cuda.is_available():
        pytest.fail("the kernels were imported before TRITON_INTERPRET=1 was set")
    return triton


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", ["random", "clip", "converged", "permuted", "duplicates", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_budget(triton_kernels: ModuleType, device: str, dtype: torch.dtype, kind: str) -> None:
    inputs = clip_features(150, 40, kind=kind, dtype=dtype, device=device)
    results = value_and_gradients(lambda *x: contrastive_loss(*x, impl="triton"), inputs)
    eager = value_and_gradients(lambda i, t, s: eager_contrastive_loss(i, t, s.to(i.dtype)), inputs)
    exact = value_and_gradients(exact_contrastive_loss, inputs, torch.float64)
    assert_within_budget(results, eager, exact, contrastive_loss_units(inputs))


MASKS = ("offset", "labels", "groups", "labels and groups", "no positives")


def mask(name: str, n: int, m: int, device: str) -> dict[str, Any]:
    """Labels in any order, some rows without; groups of five or so, far apart as numbers."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.randperm(m, generator=generator)[:n]
    labels[n // 2] = -1
    groups = torch.randint(0, 1 + m // 5, (m,), generator=generator) * (1 << 40)
    options: dict[str, Any] = {"labels": labels} if "labels" in name else {}
    if "groups" in name:
        options |= {"row_groups": groups[:n], "col_groups": groups.flip(0)}
    options = {key: value.to(device) for key, value in options.items()}
    return options | ({"offset": m} if name == "no positives" else {})


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 9, 7), (3, 3, 1), (70, 150, 33), (300, 421, 24)])
def test_masks_agree_with_the_reference(
    triton_kernels: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch, name: str, n: int, m: int, d: int
) -> None:
    """Every kind of mask over more blocks of rows than programs, parts of the columns and chunks of dz."""
    monkeypatch.setattr(triton_kernels, "CHUNK_ROWS", 128)
    monkeypatch.setattr(triton_kernels, "CHUNK_COLS", 192)
    image, text, scale = clip_features(max(n, m), d, device=device)
    leaves = [x.detach().requires_grad_() for x in (image[:n], text[:m], scale)]
    results = {}
    for impl in ("triton", "reference"):
        values = contrastive_block(*leaves, impl=impl, **mask(name, n, m, device))
        known = [x.nan_to_num(nan=0.0, neginf=-1e3) for x in values]
        weights = [torch.linspace(1, 2, len(x), device=device) for x in known]
        total = sum((w * x).sum() for w, x in zip(weights, known, strict=True))
        results[impl] = (known, torch.autograd.grad(total, leaves))
    for ours, plain in zip(results["triton"][0], results["reference"][0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)
    for ours, plain in zip(results["triton"][1], results["reference"][1], strict=True):
        assert (ours - plain).norm() <= 2e-5 * plain.norm() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["labels", "positive", "ignore, labels", "everything"])
def test_options_of_the_loss(triton_kernels: ModuleType, device: str, dtype: torch.dtype, name: str) -> None:
    problem = make_problem((70,), (150,), d=33)
    options = problem.options(OPTIONS[name] | {"reduction": "mean"}, rank=0)
    options = {key: tree_map_only(torch.Tensor, lambda x: x.detach().to(device), x) for key, x in options.items()}
    inputs = [x.detach().to(device, dtype) for x in problem.leaves()[:2]] + [torch.tensor(100.0, device=device)]
    results = value_and_gradients(lambda *x: contrastive_loss(*x, impl="triton", **options), inputs)
    exact = value_and_gradients(lambda *x: textbook_contrastive_loss(*x, **options), inputs, torch.float64)
    assert relative_error(results[0], exact[0]) < 1e-5
    for value, truth in zip(results[1:3], exact[1:3], strict=True):
        assert relative_error(value, truth) < (4e-6 if dtype == torch.float32 else 1e-3)


def test_bfloat16_gradients_are_multiplied_as_float16(triton_kernels: ModuleType) -> None:
    """Features of any size keep their values there: its largest is 65504, its smallest normal number 6e-5."""
    for size in (1e-20, 1.0, 1e20):
        x = (size * torch.randn(64, 64)).bfloat16()
        half, unit = triton_kernels._as_half(x)
        assert half.dtype == torch.float16
        assert torch.equal(half.double() * unit.double(), x.double())
    assert triton_kernels._as_half(torch.zeros(2, 2).bfloat16())[0].eq(0).all()
    assert triton_kernels._as_half(torch.tensor([[torch.inf, 1.0]]).bfloat16())[0].isinf().any()


@pytest.mark.parametrize(
    ("n", "m", "d", "offset"), [(1, 1, 1, 0), (1, 9, 7, 3), (65, 129, 513, 64), (600, 1000, 33, 400)]
)
def test_rectangular_blocks_agree_with_the_reference(
    triton_kernels: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch, n: int, m: int, d: int, offset: int
) -> None:
    """More blocks of rows than programs, several parts of the columns, and several chunks of dz."""
    monkeypatch.setattr(triton_kernels, "CHUNK_ROWS", 256)
    monkeypatch.setattr(triton_kernels, "CHUNK_COLS", 384)
    image, text, scale = clip_features(max(n, m), d, device=device)
    leaves = [x.detach().requires_grad_() for x in (image[:n], text[:m], scale)]
    outputs = {impl: contrastive_block(*leaves, offset, impl) for impl in ("triton", "reference")}
    for ours, plain in zip(outputs["triton"], outputs["reference"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)
    weights = [torch.rand_like(x) for x in outputs["reference"]]
    grads = {}
    for impl, values in outputs.items():
        total = sum((w * x.nan_to_num(neginf=0)).sum() for w, x in zip(weights, values, strict=True))
        grads[impl] = torch.autograd.grad(total, leaves)
    for ours, plain in zip(grads["triton"], grads["reference"], strict=True):
        assert (ours - plain).norm() <= 2e-5 * plain.norm() + 1e-5


def test_half_precision_keeps_small_gradients(triton_kernels: ModuleType, device: str) -> None:
    """Weights of 1e-9, far below what float16 holds: dz is scaled before it is rounded."""
    inputs = clip_features(64, 32, kind="clip", dtype=torch.float16, device=device)
    tiny, plain = (
        torch.autograd.grad(contrastive_block(*inputs, 0, "triton")[2].sum() * w, inputs[2])[0].item()
        for w in (1e-9, 1)
    )
    assert tiny == pytest.approx(1e-9 * plain, rel=1e-5)


def test_bitwise_deterministic(triton_kernels: ModuleType, device: str) -> None:
    inputs = clip_features(300, 20, device=device)
    runs = [value_and_gradients(lambda *x: contrastive_loss(*x, impl="triton"), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_strided_inputs(triton_kernels: ModuleType, device: str) -> None:
    image, text, scale = clip_features(40, 24, device=device)
    turned = image.detach().T.contiguous().T.requires_grad_()
    loss, plain = (contrastive_loss(x, text, scale, impl="triton") for x in (turned, image))
    assert relative_error(loss.double(), plain.double()) < 1e-6


COMPILE = """
import json, sys
from fastclip.ops.contrastive_loss.triton import configurations
from fastclip.testing import compile_offline
cases = [(case["kernel"].fn.__name__, case["types"].get("image", ""), case) for case in configurations()]
print(json.dumps([(*names, *compile_offline(**case, capability=int(sys.argv[1]))) for *names, case in cases]))
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    usages = json.loads(result.stdout)
    assert len(usages) == 29  # three in three dtypes (plain, labels, labels and groups), one in two
    for kernel, features, registers, stack_bytes, shared_bytes in usages:
        assert stack_bytes == 0, f"{kernel} of {features} spills {stack_bytes} bytes on sm_{capability}"
        assert 0 < registers <= 255
        assert shared_bytes <= SHARED_BYTES[capability]
