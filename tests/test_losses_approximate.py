"""The contrastive loss whose gradient leaves blocks out: exact without a tolerance, within its bound with one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import approximate_contrastive_loss, contrastive_loss
from fastclip.ops import _extension
from fastclip.ops.contrastive_loss.skipping import LeftOut, similar_first
from fastclip.testing import clip_features, relative_error

pytestmark = pytest.mark.skipif(_extension.load() is not None, reason="the compiled kernels are not built")

Inputs = tuple[Tensor, Tensor, Tensor]


def in_clusters(n: int, d: int = 48, clusters: int = 16, scale: float = 60.0) -> Inputs:
    """As of a trained model: pairs of one subject are near each other, pairs of others far."""
    generator = torch.Generator().manual_seed(0)
    subject = torch.randn(clusters, d, generator=generator)[torch.randint(0, clusters, (n,), generator=generator)]
    pair = torch.randn(n, d, generator=generator)
    image, text = (
        F.normalize(subject + 0.5 * pair + 0.3 * torch.randn(n, d, generator=generator), dim=1) for _ in range(2)
    )
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(scale, requires_grad=True)


def gradients(inputs: Inputs, tolerance: float, sorts: bool = True) -> tuple[Tensor, list[Tensor], LeftOut]:
    loss, left_out = approximate_contrastive_loss(*inputs, tolerance, sorts=sorts)
    return loss.detach(), list(torch.autograd.grad(loss, inputs)), left_out


def truth(inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    image, text, scale = (x.detach().double().requires_grad_() for x in inputs)
    loss = contrastive_loss(image, text, scale)
    return loss.detach(), list(torch.autograd.grad(loss, (image, text, scale)))


@pytest.mark.parametrize("sorts", [True, False])
@pytest.mark.parametrize(("n", "d"), [(1, 5), (2, 16), (77, 33), (130, 64), (1024, 7), (1100, 96), (2309, 40)])
def test_without_a_tolerance_it_is_exact(n: int, d: int, sorts: bool) -> None:
    inputs = clip_features(n, d, kind="clip", scale=20)
    loss, found, _ = gradients(inputs, 0.0, sorts)
    exact, wanted = truth(inputs)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-12)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        assert relative_error(a, b) < 4e-6
    assert found[2].item() == pytest.approx(wanted[2].item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("n", [900, 2500])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-3, 1e-2, 0.3])
def test_the_error_is_within_its_bound_and_not_far_below(n: int, tolerance: float) -> None:
    inputs = in_clusters(n)
    loss, found, left_out = gradients(inputs, tolerance)
    exact, wanted = truth(inputs)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    rounding = 4e-6
    for a, b, bound in zip(found[:2], wanted[:2], left_out[:2], strict=True):
        error = relative_error(a, b)
        assert error <= bound + rounding
        assert bound <= 20 * error
    assert abs(found[2] - wanted[2]) <= left_out.scale + 1e-6
    assert left_out.scale <= 1.1 * tolerance  # of a sum of |dz| of at most 1
    assert left_out.early + left_out.late > 0.1


def test_sorted_pairs_leave_more_blocks_out() -> None:
    inputs = in_clusters(4000)
    shares = [float(sum(gradients(inputs, 1e-3, sorts)[2][3:])) for sorts in (True, False)]
    assert shares[0] > 0.5
    assert shares[0] > 2 * shares[1]


def test_similar_pairs_stand_together() -> None:
    image, text, _ = in_clusters(512)
    order = similar_first(image.detach(), text.detach())
    assert torch.equal(order.sort().values, torch.arange(512))
    near = (image[order[:-1]] * image[order[1:]]).sum(1).mean()
    assert near > 2 * (image[:-1] * image[1:]).sum(1).mean()


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    inputs, threads = in_clusters(2500), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(inputs, 1e-3))
    finally:
        torch.set_num_threads(threads)
    for loss, found, left_out in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(found, results[0][1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(left_out, results[0][2], strict=True))


def test_the_incoming_gradient_and_16_bit_features() -> None:
    image, text, scale = (x.detach() for x in in_clusters(600))
    narrow = (image.bfloat16().requires_grad_(), text.bfloat16().requires_grad_(), scale.requires_grad_())
    loss, _ = approximate_contrastive_loss(*narrow, 1e-3)
    found = torch.autograd.grad(3 * loss, narrow)
    _, wanted = truth(narrow)
    assert found[0].dtype == torch.bfloat16
    assert relative_error(found[0], 3 * wanted[0]) < 5e-3


def test_what_is_not_finite_shows() -> None:
    image, text, scale = in_clusters(300)
    broken = image.detach().clone()
    broken[7, 3] = torch.nan
    loss, _ = approximate_contrastive_loss(broken.requires_grad_(), text, scale)
    assert loss.isnan()
    assert torch.autograd.grad(loss, text)[0].isnan().any()


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, scale = in_clusters(8)
    for arguments, message in (
        (((image, text, scale, -1.0), {}), "tolerance is -1.0, must be at least 0"),
        (((image, text, scale, float("nan")), {}), "tolerance is nan, must be at least 0"),
        (((image, text, -scale), {}), "logit_scale is -60, must be above 0"),
        (((image, text[:5], scale), {}), r"text_features has shape \(5, 48\), must be \(8, 48\)"),
        (((image.double(), text.double(), scale), {}), "image_features is torch.float64, must be float32 or bfloat16"),
        (((image, text, scale), {"impl": "triton"}), "impl is 'triton', must be 'auto' or 'cpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            approximate_contrastive_loss(*arguments[0], **arguments[1])
    monkeypatch.setattr(_extension, "load", lambda: "the compiled kernels are not built (run `fastclip build`)")
    with pytest.raises(ValueError, match="cannot run here: the compiled kernels are not built"):
        approximate_contrastive_loss(image, text, scale)
