"""Input makers, exact answers and the error budget, shared by tests, benchmarks and users who add a kernel."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LossInputs = tuple[Tensor, Tensor, Tensor]


def clip_features(
    n: int,
    d: int,
    *,
    kind: str = "random",
    scale: float = 100.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LossInputs:
    """Unit image features (n, d), text features (n, d) and a scale, as leaves that require a gradient.

    kind: "random" (as at initialisation: no pair is alike), "clip" (positives near cos 0.33, negatives near 0.15: a
        trained CLIP), "converged" (every text equals its image), "permuted" (every text equals another image: the loss
        is near its worst), "duplicates" (all pairs the same), "zero" (random, with a zero vector in each tower).
    """
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "clip":
        shared, pair = (
            torch.randn(1, d, generator=generator, dtype=torch.float64),
            torch.randn(n, d, generator=generator, dtype=torch.float64),
        )
        image, text = (0.39 * shared + 0.42 * pair + 0.82 * noise for noise in (image, text))
    elif kind == "converged":
        text = image.clone()
    elif kind == "permuted":
        text = image.roll(1, 0)
    elif kind == "duplicates":
        image, text = image[:1].repeat(n, 1), text[:1].repeat(n, 1)
    elif kind == "zero":
        image[0], text[-1] = 0, 0
    elif kind != "random":
        raise ValueError(f"kind is {kind!r}, must be random, clip, converged, permuted, duplicates or zero")
    image, text = (F.normalize(x, dim=1).to(device=device, dtype=dtype).requires_grad_() for x in (image, text))
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return image, text, torch.tensor(scale, dtype=scale_dtype, device=device, requires_grad=True)


def eager_contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The textbook loss with its N x N matrix, in the dtype given: what everybody writes."""
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def exact_contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The truth, from fp64 features: 1 / 2N sum_i log1p(sum_{j != i} exp(z_ij - z_ii)) + log1p(sum_{j != i} exp(z_ji -
    z_ii)).

    Another formula than any implementation uses, exact for converged pairs too; overflows where logits differ by more
    than 700.
    """
    logits = logit_scale.double() * image_features.double() @ text_features.double().T
    others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    rows, columns = ((x - x.diagonal()[:, None]).exp().where(others, 0).sum(1).log1p() for x in (logits, logits.T))
    return (rows + columns).mean() / 2


def value_and_gradients(
    loss: Callable[..., Tensor], inputs: LossInputs, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """loss(*inputs) and its gradient for each input, detached and in fp64; the inputs are first copied to `dtype`."""
    leaves = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in inputs]
    value = loss(*leaves)
    return tuple(x.detach().double() for x in (value, *torch.autograd.grad(value, leaves)))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact| in the Frobenius norm; the absolute error where the exact value is zero."""
    norm = exact.norm().item()
    return (value - exact).norm().item() / (norm or 1.0)


def assert_within_budget(
    results: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    floor: float,
    names: tuple[str, ...],
) -> None:
    """Every result errs at most twice as much as eager code of the same dtype against fp64 (`floor`: what rounding
    alone may do)."""
    for name, value, plain, truth in zip(names, results, eager, exact, strict=True):
        error, budget = relative_error(value, truth), 2 * relative_error(plain, truth) + floor
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.2e}"
