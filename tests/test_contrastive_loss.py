"""The contrastive block: every implementation against fp64, its registration, its memory and its edges."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastclip.losses import contrastive_loss
from fastclip.ops import _extension
from fastclip.ops.contrastive_loss import contrastive_block, reference
from fastclip.testing import (
    assert_within_budget,
    clip_features,
    contrastive_loss_units,
    eager_contrastive_loss,
    exact_contrastive_loss,
    relative_error,
    value_and_gradients,
)

NAMES = ("loss", "d_image_features", "d_text_features", "d_logit_scale")
KINDS = ("random", "clip", "converged", "permuted", "duplicates", "zero")
IMPLS = (
    "reference",
    "dense",
    pytest.param("cpu", marks=pytest.mark.skipif(_extension.load() is not None, reason="csrc")),
)


def block(n: int, m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(rows, d, generator=generator), dim=1) for rows in (n, m))
    return image, text, torch.tensor(100.0)


def exact_block(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """positive, row and column log-sum-exp of the negatives, by indexing, in fp64."""
    z = scale.double() * image.double() @ text.double().T
    positive = torch.arange(z.shape[1]) == torch.arange(z.shape[0])[:, None] + offset
    negatives = z.masked_fill(positive, -torch.inf)
    return z[positive], negatives.logsumexp(1), negatives.logsumexp(0)


def test_exact_formula_is_the_textbook_one() -> None:
    inputs = clip_features(20, 16, dtype=torch.float64, scale=10.0)
    pairs = zip(
        value_and_gradients(exact_contrastive_loss, inputs),
        value_and_gradients(eager_contrastive_loss, inputs),
        strict=True,
    )
    assert all(relative_error(a, b) < 1e-13 for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_exact_in_fp64(kind: str) -> None:
    inputs = clip_features(33, 24, kind=kind, dtype=torch.float64)
    results = value_and_gradients(lambda *x: contrastive_loss(*x, impl="reference"), inputs)
    exact = value_and_gradients(exact_contrastive_loss, inputs)
    for name, value, truth in zip(NAMES, results, exact, strict=True):
        assert (value - truth).norm() <= 1e-12 * truth.norm() + 1e-13 * (kind == "duplicates"), name


@pytest.mark.parametrize("directions", ["both", "image", "text"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradcheck_fp64(directions: str, n: int) -> None:
    inputs = clip_features(n, 3, dtype=torch.float64, scale=4.0)

    def loss(*x):
        return contrastive_loss(*x, directions=directions, reduction="none", normalize=True, impl="reference")

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("shape", [(3, 7, 4), (1, 2, 0), (2, 2, 0)])
def test_gradcheck_of_a_rectangular_block(shape: tuple[int, int, int]) -> None:
    n, m, offset = shape
    image, text, _ = block(n, m, 3)
    leaves = [x.double().requires_grad_() for x in (image, text, torch.tensor(4.0))]

    def negatives_and_positive(*x: Tensor) -> tuple[Tensor, ...]:
        positive, row_max, row_log_sum, col_max, col_log_sum = contrastive_block(*x, offset, "reference")
        lse = torch.cat([row_max + row_log_sum, col_max + col_log_sum])
        return positive, lse[lse.isfinite()]

    # gradcheck perturbs the maxima too, so compare with autograd through the plain formula instead
    ours = negatives_and_positive(*leaves)
    plain = exact_block(*leaves, offset)
    plain_lse = torch.cat(plain[1:])
    weights = torch.rand(len(plain_lse), dtype=torch.float64)[plain_lse.isfinite()]

    def total(positive, lse):
        return positive.square().sum() + (weights * lse.sigmoid()).sum()

    ours_grads = torch.autograd.grad(total(*ours), leaves)
    plain_grads = torch.autograd.grad(total(plain[0], plain_lse[plain_lse.isfinite()]), leaves)
    for mine, theirs in zip(ours_grads, plain_grads, strict=True):
        assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_error_budget(impl: str, dtype: torch.dtype, kind: str) -> None:
    for n, d in ((67, 33), (256, 64)):
        inputs = clip_features(n, d, kind=kind, dtype=dtype)
        results = value_and_gradients(lambda *x: contrastive_loss(*x, impl=impl), inputs)
        eager = value_and_gradients(lambda i, t, s: eager_contrastive_loss(i, t, s.to(i.dtype)), inputs)
        exact = value_and_gradients(exact_contrastive_loss, inputs, torch.float64)
        assert all(x.isfinite().all() for x in results)
        assert_within_budget(results, eager, exact, contrastive_loss_units(inputs))


@pytest.mark.parametrize("impl", IMPLS)
def test_converged_pairs_keep_their_relative_accuracy(impl: str) -> None:
    """The loss is about 1e-19: eager code says 0, and so is its gradient."""
    inputs = clip_features(16, 64, kind="converged", scale=60.0)
    results = value_and_gradients(lambda *x: contrastive_loss(*x, impl=impl), inputs)
    exact = value_and_gradients(exact_contrastive_loss, inputs, torch.float64)
    assert 0 < exact[0] < 1e-12
    assert all(relative_error(value, truth) < 1e-4 for value, truth in zip(results, exact, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 7), (2, 1), (3, 7), (17, 513), (63, 8), (130, 40)])
def test_odd_shapes(impl: str, n: int, d: int) -> None:
    inputs = clip_features(n, d, scale=20.0)
    results = value_and_gradients(lambda *x: contrastive_loss(*x, impl=impl), inputs)
    exact = value_and_gradients(exact_contrastive_loss, inputs, torch.float64)
    for name, value, truth in zip(NAMES, results, exact, strict=True):
        assert (value - truth).norm() <= 1e-5 * truth.norm() + 1e-6, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("n", "m", "offset"),
    [
        (1, 9, 3),  # columns without negatives elsewhere
        (5, 5, 0),
        (70, 1100, 1030),  # positives at the end
        (513, 2049, 700),  # one row and one column beyond the CPU kernel's chunk
    ],
)
def test_rectangular_blocks(impl: str, n: int, m: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 100 * m)  # several chunks
    image, text, scale = block(n, m, 48)
    positive, row_max, row_log_sum, col_max, col_log_sum = contrastive_block(image, text, scale, offset, impl)
    exact = exact_block(image, text, scale, offset)
    for value, truth in zip((positive, row_max + row_log_sum, col_max + col_log_sum), exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-4)
    z = (scale * image @ text.T).masked_fill(torch.eye(m, dtype=torch.bool)[offset : offset + n], -torch.inf)
    torch.testing.assert_close(row_max, z.amax(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(col_max, z.amax(0), rtol=1e-5, atol=1e-4)

    leaves = [x.requires_grad_() for x in (image, text, scale)]
    weights = torch.rand(n + m)

    def total(*x: Tensor) -> Tensor:
        positive, row_max, row_log_sum, col_max, col_log_sum = contrastive_block(*x, offset, impl)
        lse = torch.cat([row_max + row_log_sum, col_max + col_log_sum])
        return (weights * lse.nan_to_num(neginf=0)).sum() + positive.sum() / 2

    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    truth, row_lse, col_lse = exact_block(*exact_leaves, offset)
    finite = torch.cat([row_lse, col_lse])
    exact_total = (weights * torch.where(finite.isfinite(), finite, 0)).sum() + truth.sum() / 2
    for value, grad in zip(
        torch.autograd.grad(total(*leaves), leaves), torch.autograd.grad(exact_total, exact_leaves), strict=True
    ):
        assert (value - grad).norm() <= 1e-5 * grad.norm() + 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_are_read_right_and_left_alone(impl: str) -> None:
    image, text, scale = clip_features(40, 24)
    wide = torch.randn(24, 80)
    wide[:, ::2] = image.detach().T
    strided = wide.T[::2].requires_grad_()
    before = strided.detach().clone(), text.detach().clone()
    ours = torch.autograd.grad(contrastive_loss(strided, text, scale, impl=impl), (strided, text))
    plain = torch.autograd.grad(contrastive_loss(image, text, scale, impl=impl), (image, text))
    assert all(relative_error(a.double(), b.double()) < 1e-6 for a, b in zip(ours, plain, strict=True))
    assert torch.equal(before[0], strided.detach())
    assert torch.equal(before[1], text.detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_bitwise_deterministic(impl: str) -> None:
    inputs = clip_features(700, 32)
    runs = [value_and_gradients(lambda *x: contrastive_loss(*x, impl=impl), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autograd_keeps_no_matrix() -> None:
    n, d = 3000, 4
    image, text, scale = clip_features(n, d)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        contrastive_loss(image, text, scale)
    assert 0 < sum(kept.values()) <= 4 * n * (2 * d + 16)


def test_no_double_backward() -> None:
    image, text, scale = clip_features(4, 3)
    (grad,) = torch.autograd.grad(contrastive_loss(image, text, scale), image, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_does_not_reach_inside() -> None:
    inputs = clip_features(64, 32, kind="clip")
    plain = value_and_gradients(lambda *x: contrastive_loss(*x, impl="reference"), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_gradients(lambda *x: contrastive_loss(*x, impl="reference"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(impl: str, dtype: torch.dtype) -> None:
    image, text, scale = block(6, 9, 5)
    image, text = image.to(dtype), text.to(dtype)
    labels, groups = torch.tensor([3, 8, 0, 7, 1, 5]), torch.arange(9) // 2
    masks = [(2, None, None, None)] + [(0, labels, groups[:6], groups)] * (impl != "cpu")
    for mask, kept_rows in itertools.product(masks, (0, 6)):
        arguments = (image, text, scale, *mask, kept_rows, impl)
        torch.library.opcheck(torch.ops.fastclip.contrastive_loss_fwd.default, arguments)
        positive, row_max, row_log_sum, col_max, col_log_sum, kept = torch.ops.fastclip.contrastive_loss_fwd(*arguments)
        saved = (image, text, scale, row_max, row_log_sum, col_max, col_log_sum)
        grads = (torch.ones_like(positive), torch.ones_like(row_log_sum), torch.ones_like(col_log_sum))
        torch.library.opcheck(torch.ops.fastclip.contrastive_loss_bwd.default, (*grads, *saved, *mask, kept, impl))


@pytest.mark.parametrize("groups", [(None, None), (torch.arange(6), torch.arange(9) // 2)])
def test_opcheck_of_the_sums(groups: tuple[Tensor | None, Tensor | None]) -> None:
    image, text, scale = block(6, 9, 5)
    torch.library.opcheck(torch.ops.fastclip.contrastive_sums_fwd.default, (image, text, scale, *groups))
    arguments = (torch.ones(6), torch.ones(9), image, text, *groups)
    torch.library.opcheck(torch.ops.fastclip.contrastive_sums_bwd.default, arguments)


def test_compiles_to_one_graph_for_every_batch_size() -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(lambda *x: contrastive_loss(*x, normalize=True), backend=frames, fullgraph=True, dynamic=True)
    for n in (32, 48, 80):
        inputs = clip_features(n, 16)
        plain = value_and_gradients(lambda *x: contrastive_loss(*x, normalize=True), inputs)
        for value, truth in zip(value_and_gradients(loss, inputs), plain, strict=True):
            assert relative_error(value, truth) < 1e-5
    graphs = [graph for graph in frames.graphs if any(node.op == "call_function" for node in graph.graph.nodes)]
    assert len(graphs) == 1
