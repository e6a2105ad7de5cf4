"""The GPU kernels: Triton's on a GPU or in the interpreter (where bfloat16 products are wrong), and compiled offline;
those of csrc/cuda on a Hopper GPU (`test_cuda` compiles them)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses_helpers import OPTIONS, make_problem
from offline_helpers import CAPABILITIES, assert_compiles
from pairs_helpers import (
    DEVICE,
    HALF_TYPES,
    HAS_GPU,
    ONE_TYPE_EACH,
    TYPES,
    assert_close_to,
    interpreter,  # noqa: F401
    rectangle,
    set_chunks,
    widened,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastclip.losses import contrastive_loss
from fastclip.ops.contrastive_loss import chunks, contrastive_block, cuda
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

BUDGETS = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}  # of the gradient at a scale of 100

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),  # lanes that are masked
]


@pytest.mark.parametrize("kind", ["random", "clip", "converged", "permuted", "duplicates", "zero"])
@pytest.mark.parametrize(("impl", "dtype"), TYPES)
def test_error_budget(impl: str, dtype: torch.dtype, kind: str) -> None:
    inputs = clip_features(150, 40, kind=kind, dtype=dtype, device=DEVICE)
    results = value_and_gradients(lambda *x: contrastive_loss(*x, impl=impl), inputs)
    eager = value_and_gradients(lambda i, t, s: eager_contrastive_loss(i, t, s.to(i.dtype)), inputs)
    exact = value_and_gradients(exact_contrastive_loss, inputs, torch.float64)
    # A GPU's own exponential, 2 ulp, errs alike for all pairs that are alike.
    assert_within_budget(results, eager, exact, contrastive_loss_units(inputs), floor=1e-6 if HAS_GPU else 5e-7)


MASKS = ("offset", "labels", "groups", "labels and groups", "no positives")


def mask(name: str, n: int, m: int) -> dict[str, Any]:
    """Labels in any order, some rows without; groups of five or so, far apart as numbers."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.randperm(m, generator=generator)[:n]
    labels[n // 2] = -1
    groups = torch.randint(0, 1 + m // 5, (m,), generator=generator) * (1 << 40)
    options: dict[str, Any] = {"labels": labels} if "labels" in name else {}
    if "groups" in name:
        options |= {"row_groups": groups[:n], "col_groups": groups.flip(0)}
    options = {key: value.to(DEVICE) for key, value in options.items()}
    return options | ({"offset": m} if name == "no positives" else {})


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 9, 7), (3, 3, 1), (70, 150, 33), (300, 421, 24)])
@pytest.mark.parametrize(("impl", "dtype"), ONE_TYPE_EACH)
def test_masks_agree_with_the_reference(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, name: str, n: int, m: int, d: int
) -> None:
    """Every kind of mask over more blocks of rows than programs, parts of the columns and chunks of dz."""
    set_chunks(monkeypatch, 128, 192, chunks, cuda)
    leaves = rectangle(n, m, d, dtype)
    results = {}
    for name_of, inputs in ((impl, leaves), ("reference", widened(leaves))):
        values = contrastive_block(*inputs, impl=name_of, **mask(name, n, m))
        known = [x.nan_to_num(nan=0.0, neginf=-1e3) for x in values]
        weights = [torch.linspace(1, 2, len(x), device=DEVICE) for x in known]
        total = sum((w * x).sum() for w, x in zip(weights, known, strict=True))
        results[name_of] = (known, torch.autograd.grad(total, inputs))
    for ours, plain in zip(results[impl][0], results["reference"][0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)
    assert_close_to(results["reference"][1], results[impl][1], dtype)


def rounded_unit(x: Tensor) -> Tensor:
    """x normalised and rounded to float16, with the gradient of what was not rounded."""
    unit = F.normalize(x, dim=1)
    return unit + (unit.half().to(unit.dtype) - unit).detach()


@pytest.mark.parametrize(("impl", "dtype"), TYPES)
@pytest.mark.parametrize("name", ["labels", "positive", "ignore, labels", "everything"])
def test_options_of_the_loss(impl: str, dtype: torch.dtype, name: str) -> None:
    problem = make_problem((70,), (150,), d=33)
    options = problem.options(OPTIONS[name] | {"reduction": "mean"}, rank=0)
    options = {key: tree_map_only(torch.Tensor, lambda x: x.detach().to(DEVICE), x) for key, x in options.items()}
    inputs = [x.detach().to(DEVICE, dtype) for x in problem.leaves()[:2]] + [torch.tensor(100.0, device=DEVICE)]
    results = value_and_gradients(lambda *x: contrastive_loss(*x, impl=impl, **options), inputs)

    rounds = HAS_GPU and dtype != torch.float32 and options.pop("normalize", False)  # as the docstring says

    def textbook(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        image, text = (rounded_unit(x) if rounds else x for x in (image, text))
        return textbook_contrastive_loss(image, text, scale, **options)

    exact = value_and_gradients(textbook, inputs, torch.float64)
    assert relative_error(results[0], exact[0]) < 1e-5
    for value, truth in zip(results[1:3], exact[1:3], strict=True):
        assert relative_error(value, truth) < BUDGETS[dtype]


def test_bfloat16_gradients_are_multiplied_as_float16() -> None:
    """Features of any size keep their values there: its largest is 65504, its smallest normal number 6e-5."""
    for size in (1e-20, 1.0, 1e20):
        x = (size * torch.randn(64, 64)).bfloat16()
        half, unit = chunks.as_half(x)
        assert half.dtype == torch.float16
        assert torch.equal(half.double() * unit.double(), x.double())
    assert chunks.as_half(torch.zeros(2, 2).bfloat16())[0].eq(0).all()
    assert chunks.as_half(torch.tensor([[torch.inf, 1.0]]).bfloat16())[0].isinf().any()


@pytest.mark.parametrize(
    ("n", "m", "d", "offset"), [(1, 1, 1, 0), (1, 9, 7, 3), (65, 129, 513, 64), (600, 1000, 33, 400)]
)
@pytest.mark.parametrize(("impl", "dtype"), ONE_TYPE_EACH)
def test_rectangular_blocks_agree_with_the_reference(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, n: int, m: int, d: int, offset: int
) -> None:
    """More blocks of rows than programs, several parts of the columns, and several chunks of dz."""
    set_chunks(monkeypatch, 256, 384, chunks, cuda)
    leaves = rectangle(n, m, d, dtype)
    inputs = {impl: leaves, "reference": widened(leaves)}
    outputs = {name: contrastive_block(*x, offset, name) for name, x in inputs.items()}
    for ours, plain in zip(outputs[impl], outputs["reference"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)
    weights = [torch.rand_like(x) for x in outputs["reference"]]
    grads = {}
    for name, values in outputs.items():
        total = sum((w * x.nan_to_num(neginf=0)).sum() for w, x in zip(weights, values, strict=True))
        grads[name] = torch.autograd.grad(total, inputs[name])
    assert_close_to(grads["reference"], grads[impl], dtype)


@pytest.mark.parametrize(("impl", "dtype"), HALF_TYPES)
def test_half_precision_keeps_small_gradients(impl: str, dtype: torch.dtype) -> None:
    """Weights of 1e-9, far below what float16 holds: dz is scaled before it is rounded."""
    inputs = clip_features(64, 32, kind="clip", dtype=dtype, device=DEVICE)
    tiny, plain = (
        torch.autograd.grad(contrastive_block(*inputs, 0, impl)[2].sum() * w, inputs[2])[0].item() for w in (1e-9, 1)
    )
    assert tiny == pytest.approx(1e-9 * plain, rel=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("impl", "dtype"), ONE_TYPE_EACH)
def test_what_is_not_finite_shows(impl: str, dtype: torch.dtype, value: float) -> None:
    image, text, scale = clip_features(300, 20, dtype=dtype, device=DEVICE)
    image = image.detach().clone()
    image[3, 2] = value
    assert contrastive_loss(image, text, scale, impl=impl).isnan()


@pytest.mark.parametrize(("impl", "dtype"), ONE_TYPE_EACH)
def test_bitwise_deterministic(impl: str, dtype: torch.dtype) -> None:
    inputs = clip_features(300, 20, dtype=dtype, device=DEVICE)
    runs = [value_and_gradients(lambda *x: contrastive_loss(*x, impl=impl), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("impl", "dtype"), ONE_TYPE_EACH)
def test_strided_inputs(impl: str, dtype: torch.dtype) -> None:
    image, text, scale = clip_features(40, 24, dtype=dtype, device=DEVICE)
    turned = image.detach().T.contiguous().T.requires_grad_()
    loss, plain = (contrastive_loss(x, text, scale, impl=impl) for x in (turned, image))
    assert relative_error(loss.double(), plain.double()) < 1e-6


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability: int) -> None:
    assert assert_compiles(capability, "contrastive_loss.triton") == {80: 10, 90: 29, 100: 10}[capability]
